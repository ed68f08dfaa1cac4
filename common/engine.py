"""One training stage around a loop that stays in the method's file.

    run = Session(args, cfg, out, samples=len(data), batch=cfg.batch, steps=cfg.steps, epochs=cfg.epochs)
    if run.finished:
        return
    net, optimizer = ...
    model = run.attach(net, optimizer)          # loads a checkpoint that is there; DDP under torchrun
    for step, batch in run.batches(make_item, args.workers):
        ...                                     # forward, loss, backward, step: the method's own lines
        run.log(step, terms, lr)                # a line; a checkpoint four times a run, never of a nan

A Session holds what no paper invents: the folder, ranks, seeds, data order, resume, log and checkpoints. Its
parts are the functions of common/train.py. A method with several stages opens one Session a stage, each with
its own folder.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import train as parts
from common.files import hold, release


class Session:
    """The folder, device, processes, data order, log and checkpoints of one training stage.

    args: device, seed, resume, method and preset of the command line. cfg: the method's Config, kept in
    config.json. samples: training samples. batch: samples a process takes in a step. steps 0: as many as
    `epochs` need. source: JSON values about the data (root, version, split, labels). order(run, seed): a data
    order other than `DataOrder`. names: of the samples (their tokens), for messages. Raises InputError if
    `out` holds another run, or if another process is writing it.
    """

    def __init__(self, args: Any, cfg: Any, out: Path, *, samples: int, batch: int, steps: int = 0,
                 epochs: float = 0, source: dict[str, Any] | None = None, amp: str = "off",
                 seed: int | None = None, order: Callable | None = None, names: Sequence[str] = ()):
        self.run, self.out, self.amp = parts.setup(args.device), Path(out), amp
        self.rank, self.world, self.device, self.is_main = self.run
        self.seed, self.names = args.seed if seed is None else seed, names
        default = parts.DataOrder(samples, batch, self.world, self.rank, self.seed) if order is None else None
        self.order = default or order(self.run, self.seed)
        self.steps = steps or self.order.steps(epochs)
        self.settings = parts.settings(args, cfg, self.steps, source or {})
        if self.is_main:
            hold(self.out)
        self.start = parts.begin(self.out, self.run, self.settings, args.resume)
        self.finished = self.start is None
        if self.finished:
            release(self.out)
        self.save_every = max(1, min(500, self.steps // 4))
        self.state: dict[str, Any] = {}  # the method's own JSON values that a checkpoint keeps (a best score)
        self.sharded = False
        parts.seed_everything(self.seed)

    def shard(self, net: nn.Module, layers: tuple[str, ...]) -> None:
        """Under torchrun, cut the weights into shards (FSDP2) before the optimiser is made; `attach` follows.

        layers: names of the module classes that are a shard of their own.
        """
        self.sharded = self.world > 1
        if self.sharded:
            if self.start:
                parts.load_checkpoint(self.out, net)
            parts.shard(net, layers, self.amp)

    def attach(self, saved: nn.Module, optimizer: torch.optim.Optimizer,
               called: nn.Module | None = None, find_unused: bool = False) -> nn.Module:
        """Load the stage's checkpoint, if there is one; -> the module that the loop calls (DDP under
        torchrun).

        saved: all that a checkpoint holds. called: the part that the loop calls, where that is less.
        find_unused: some of its parameters get no gradient.
        """
        self.saved, self.optimizer = saved, optimizer
        if self.start:
            self.state = parts.load_checkpoint(self.out, *self.whole(), self.run, self.settings)
            del self.state["step"]  # of that checkpoint, not of those to come
        self.lines = parts.Log(self.out, self.run, self.steps, self.start, self.state)
        called = saved if called is None else called
        return called if self.sharded else parts.wrap(called, self.run, find_unused)

    def whole(self) -> tuple[Any, Any]:
        """Network and optimiser as a checkpoint holds them."""
        both = self.saved, self.optimizer
        return tuple(map(parts.Unsharded, both)) if self.sharded else both

    def batches(self, make_item: Callable[[int, np.random.Generator], Any], workers: int = 2,
                collate: Callable | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) from the first step still to do; make_item(index, generator) runs ahead in
        threads.

        collate: list of items -> batch; default: every tensor stacked, on this process's device.
        """
        for step, items in parts.prefetch(make_item, self.order, self.start, self.steps, workers, self.lines):
            yield step, collate(items) if collate else stack(items, self.device)

    def autocast(self) -> AbstractContextManager:
        """bfloat16 where amp is bf16, else nothing."""
        return parts.autocast(self.device, self.amp)

    def log(self, step: int, terms: dict[str, Tensor], lr: float) -> None:
        """Note a finished step: a line when one is due, the loss being the terms' sum; likewise a
        checkpoint."""
        done = step + 1
        due = done % self.save_every == 0 or done == self.steps
        self.lines(step, {"loss": sum(terms.values()), **terms}, lr, look=due, samples=self._seen)
        if due:
            self.state |= self.lines.state()
            parts.save_checkpoint(self.out, self.run, *self.whole(), done, self.state)
        if done == self.steps:
            release(self.out)

    def _seen(self, step: int) -> str:
        """The samples that all processes saw at a step, by their names where the method gave any."""
        if not isinstance(self.order, parts.DataOrder):
            return ""
        places = range(step * self.world * self.order.batch, (step + 1) * self.world * self.order.batch)
        samples = [self.order.sample(place) for place in places]
        words = [str(self.names[i]) if self.names else str(i) for i in samples]
        return f"samples {' '.join(words[:16])}{' ...' if len(words) > 16 else ''}"


def stack(items: list[dict[str, Tensor]], device: torch.device | str) -> dict[str, Tensor]:
    """Items -> a batch: every field with a leading batch axis, on the device."""
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
