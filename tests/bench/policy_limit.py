"""What limits 3DVLA's tiny policies: where objects are, or how many frames their expert has learned from?

    python -m tests.bench.policy_limit --ckpt runs/x/stage0 [--data-root W] [--episodes 48] [--out F.json]

Root mean square error of the first action of a plan, by channel, on frames of the scripted expert's episodes
with evaluation's seeds (nudged off their way as the demonstrations are). Beside the policy stands a
regression on the truth: the named objects' offsets from the hand, the state and the task; a perceptron
learned by squared error from the same demonstrations, once from as many frames as the policy's own training
has seen and once from many more. If it is no better at as many frames, tokens that hold the offsets cannot
help much yet; if it gains with frames, frames are scarce.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import threedvla as V  # noqa: E402
from common import cli  # noqa: E402
from common.files import exit_on_input_error, read_json, write_json  # noqa: E402
from common.geometry import fourier  # noqa: E402
from common.networks.transformer import mlp  # noqa: E402
from common.observation import Observation  # noqa: E402
from common.report.episodes import Rules  # noqa: E402
from common.train import load_checkpoint  # noqa: E402
from data.tabletop import ROLES, TASKS, Tabletop, demonstrate, expert  # noqa: E402

MORE = 4000, 256  # steps and batch of the long regression


def truth_of(task: str, state: Tensor, things: dict[str, Tensor]) -> Tensor:
    """The regression's input of n frames: state (n, 8), things name -> (n, 3) [m, base] -> (n, 272)."""
    names = [name for role in ROLES[task] for name in role][:4]
    # (n, 12) [m]
    offsets = torch.cat([things[name] - state[:, :3] for name in (names + names[-1:] * 4)[:4]], -1)
    which = F.one_hot(torch.tensor(list(TASKS).index(task)), len(TASKS)).expand(len(state), -1)
    return torch.cat([fourier(state, 6), fourier(offsets, 6), which], -1)


def regression(x: Tensor, y: Tensor, steps: int, batch: int) -> nn.Module:
    """A perceptron x (N, C) -> y (N, 7)."""
    torch.manual_seed(0)
    net = mlp(x.shape[1], 256, 256, 256, y.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 1.2 * (1 - step / steps))
        i = torch.randint(len(x), (batch,))
        loss = F.mse_loss(net(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def unseen(episodes: int, share: float = 0.35) -> list[tuple[str, Observation, dict[str, np.ndarray],
                                                             np.ndarray]]:
    """Some frames of the expert's episodes with evaluation's seeds: task, observation, things' positions, its
    action."""
    world, frames, rng = Tabletop(), [], np.random.default_rng(0)

    def watch(w: Tabletop) -> None:
        if rng.random() < share:
            r = w.render()
            o = Observation(r["images"], r["depth"], r["K"], r["T_base_cam"], r["instances"], w.state(),
                            w.instruction)
            frames.append((w.name, o, {t.name: t.position + [0, 0, w.height] for t in w.things}, expert(w)))

    for k in range(episodes):
        demonstrate(world, list(TASKS)[k % len(TASKS)], Rules().eval_seed + k, watch=watch)
    return frames


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.policy_limit",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a base policy's stage0")
    parser.add_argument("--data-root", type=Path, default=Path("data/worlds/tabletop-30"),
                        help="what it learned from")
    parser.add_argument("--episodes", type=int, default=48, help="of the expert, to measure on")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    cfg = cli.from_dict(V.Config, read_json(args.ckpt / "config.json")["config"], args.ckpt / "config.json")
    agent = V.Agent(cfg)
    load_checkpoint(args.ckpt, agent)
    agent.eval().stage = 0
    frames, data = unseen(args.episodes), V.Frames(cfg, args.data_root).demos
    f32 = partial(torch.as_tensor, dtype=torch.float32)
    truth = f32(np.stack([f[3] for f in frames]))
    plans = [V.predict(agent, [f[1] for f in frames[k : k + 32]], list(range(k, k + len(frames[k : k + 32]))),
                       0)[0][:, 0] for k in range(0, len(frames), 32)]
    rows = {f"policy {cfg.policy}, {cfg.base_steps * cfg.batch:,} frames": f32(np.concatenate(plans))}

    x = torch.cat([truth_of(d["task"], f32(d["states"]), {name: f32(d["poses"][:, k, :3, 3]) for k, name
                                                          in enumerate(d["things"])}) for d in data.demos])
    y = torch.cat([f32(d["actions"]) for d in data.demos])
    asked = torch.cat([truth_of(task, f32(o.state)[None], {name: f32(p)[None] for name, p in at.items()})
                       for task, o, at, _ in frames])
    for steps, batch in ((cfg.base_steps, cfg.batch), MORE):
        rows[f"regression, {steps * batch:,} frames"] = regression(x, y, steps, batch)(asked)
    table = {name: (action - truth).square().mean(0).sqrt().tolist() for name, action in rows.items()}
    print(f"{len(frames)} unseen frames; root mean square error of the next action (last: its own)")
    table["deviation of the expert"] = truth.std(0).tolist()
    for name, errors in [("", ["x", "y", "z", "rx", "ry", "rz", "grip"]), *table.items()]:
        print(f"{name:36}" + "".join(f"{e:>8.3f}" if name else f"{e:>8}" for e in errors))
    if args.out:
        write_json(args.out, table)


if __name__ == "__main__":
    main()
