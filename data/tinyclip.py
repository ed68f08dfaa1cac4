"""The tiny CLIP, which stands for web pre-training where nothing may be downloaded: the encoder `street`.

    python -m data.tinyclip --hide data/openset/rare.txt --out data/worlds/tinyclip-unnamed.safetensors

How a CLIP is loaded and read: common/networks/tinyclip.py. What it has seen: data/foundation.py.

hide: kinds whose names are in no caption (they stay in the pictures, with a generic word and attributes): the
    setting *name-unseen*. The encoder stays as it is; its head of words and the text tower are learned anew
    from pictures of other worlds, and a hidden name is not in the vocabulary. Decoys stand in them (cherry
    pickers, containers, bollards), so that no attribute is a hidden kind's alone. With nothing hidden it is the
    shipped encoder, *3D-unseen*: names are known from the web, only the 3D training lacks them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.files import InputError, exit_on_input_error, read_json, write_json
from common.networks.street import CHANNELS, DIM, WEIGHTS, StreetEncoder, WordTower, load_street, save_street
from common.networks.tinyclip import read_words
from common.train import Muon, param_groups, schedule, set_apart, set_lr
from data.foundation import Names, Pictures, inverse_root, make_pictures, score, words_loss

SEED = 1  # of the pictures: streets that the encoder itself has not seen


def learn_words(net: StreetEncoder, pictures: Pictures, hidden: tuple[str, ...], steps: int, seed: int = 0,
                batch: int = 12, rate: float = 1e-2) -> None:
    """Replace the head of words and the text tower by new ones that are never told the names in `hidden`."""
    torch.manual_seed(seed)
    rng, names = np.random.default_rng(seed), Names(hidden)
    net.requires_grad_(False)
    net.read["words"], net.text = nn.Conv2d(CHANNELS, DIM, 1), WordTower(names.vocabulary())
    net.scale = nn.Parameter(torch.tensor(2.3))
    groups = torch.from_numpy(names.group_of[pictures.classes])
    regions = torch.from_numpy(pictures.regions).long()
    weight = inverse_root(groups.flatten(), len(names.groups))
    parameters = param_groups(net, rate, rate, 0.01, muon=True)
    set_apart(parameters, list(net.text.parameters()), lr=0.2 * rate, base_lr=0.2 * rate, orthogonal=False)
    optimizer = Muon([group for group in parameters if group["params"]], lr=rate)
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = torch.cat([net(part.float() / 255).half() for part in images.split(batch)])
    for step in tqdm(range(steps), "tiny CLIP", unit="step", leave=False):
        rows = rng.choice(len(images), min(batch, len(images)), replace=False)
        words, facts = net.read["words"](features[rows].float()), [pictures.facts[row] for row in rows]
        scale = net.scale.exp().clamp_max(50)
        loss = words_loss(words, groups[rows], regions[rows], facts, net, names, weight, scale, rng)
        set_lr(optimizer, schedule(step, steps, "cosine", min(20, steps // 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    del net.scale


def make_tinyclip(out: Path | str, hidden: tuple[str, ...] = (), rigs: int = 80, steps: int = 600) -> Path:
    """-> the file of the tiny CLIP: the shipped encoder, or with `hidden` names one made at `out` once.

    Raises InputError if `out` is one of other settings.
    """
    if not hidden:
        return WEIGHTS / "street.safetensors"
    out, wanted = Path(out), {"hidden": sorted(hidden), "rigs": rigs, "steps": steps}
    card = out.with_suffix(".json")
    if card.is_file() and out.is_file():
        found = read_json(card)
        if differ := [name for name in wanted if found.get(name) != wanted[name]]:
            raise InputError(f"{out}: a tiny CLIP with another {', '.join(differ)}; choose another file or "
                             "delete it")
        return out
    net, pictures = load_street("street"), make_pictures(rigs, SEED, decoys=True)
    shown = len(pictures.images) * 9 // 10
    learn_words(net, Pictures(*(field[:shown] for field in pictures)), tuple(hidden), steps)
    scores = score(net.eval(), pictures, shown)
    save_street(out, net)
    write_json(card, wanted | scores)  # last: now it is whole
    print(f"tiny CLIP {out}: {shown} pictures, {steps} steps; names {100 * scores['naming']:.0f} % of a "
          "class's cells")
    return out


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.tinyclip", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--hide", type=Path, required=True, help="file of kinds that captions never name")
    parser.add_argument("--rigs", type=int, default=80)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    make_tinyclip(args.out, tuple(read_words(args.hide)), args.rigs, args.steps)


if __name__ == "__main__":
    main()
