"""Pre-trains the miniature image encoder that stands for ImageNet, CLIP and metric depth models on the worlds.

    python -m data.foundation --out data/worlds/foundation                      # pictures, both encoders: minutes
    python -m data.foundation --out data/worlds/foundation --ship common/weights  # and puts them into the repository

WHAT IT SEES    Single photographs by a car's six cameras in streets of *other* worlds: their seed differs from any
    world that is trained or evaluated on, and no scene, object or calibration carries over.
WHAT IT LEARNS  One convolutional encoder at a quarter of the resolution, several 1x1 heads over it: the class of
    each cell; centre and extent of each object in the picture; the words for what a cell shows. The variant
    `street` knows this alone (semantics and words: what ImageNet, CLIP and PaliGemma know), `street-depth` learns
    the metric depth of each cell too, as a distribution over 32 bins (what a metric depth model knows). Nothing
    is learned of a second camera, of time, or of what is hidden.
WHAT IS KEPT    The encoder and its heads in half precision, and a card: command, seed, commit, time, scores on
    fresh pictures.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.files import exit_on_input_error, read_npz, write_json, write_npz
from common.networks.street import STRIDE, StreetEncoder, depth_bin, save_street
from common.networks.tinyclip import SEED_OFFSET
from common.nuscenes import FREE, LIDARSEG_TO_OCC3D
from common.train import Muon, commit, param_groups, schedule, set_lr

DRAWN, KEPT = (224, 400), (112, 200)  # [px] rows, columns of the photographs, and of what is learned from
SEEN = 12  # [px] of a kept photograph that an object must show to have a centre
RIGS_PER_STREET = 10


class Pictures(NamedTuple):
    """n photographs and what they show, at a quarter of their resolution (h, w)."""

    images: np.ndarray  # (n, H, W, 3) uint8
    classes: np.ndarray  # (n, h, w) uint8 Occ3D id, sky: 17
    depth: np.ndarray  # (n, h, w) float16 z-depth [m], 0: sky
    objects: np.ndarray  # (m, 6) float32: picture, Occ3D id, centre u, v, extent in u, v [px of the kept picture]


def make_pictures(rigs: int, seed: int) -> Pictures:
    """Six photographs of each of `rigs` cars."""
    import cv2

    from data.driving.city import City
    from data.driving.sensors import CAMERA_LAYOUT, calibration, matrix, photograph

    rng = np.random.default_rng([SEED_OFFSET + seed, 2])
    names = np.append(LIDARSEG_TO_OCC3D, np.full(256 - len(LIDARSEG_TO_OCC3D), FREE)).astype(np.uint8)
    half = DRAWN[0] // KEPT[0]
    images, classes, depths, objects = [], [], [], []
    for k in tqdm(range(rigs), "photographs of other worlds", unit="rig", leave=False):
        if k % RIGS_PER_STREET == 0:
            street = k // RIGS_PER_STREET
            city = City([SEED_OFFSET + seed, 2, k], 6.0, bool(street % 2), street % 7)
        t, rig = float(rng.uniform(0, 6)), calibration(rng, DRAWN)
        for row in (rig[camera] for camera in CAMERA_LAYOUT):
            K, T = np.array(row["camera_intrinsic"]), city.ego(t) @ matrix(row)
            photo = photograph(city, t, K, T, DRAWN, rng, True)
            semantic, middle = names[photo.semantic], STRIDE * half // 2
            images.append(cv2.resize(photo.color, KEPT[::-1], interpolation=cv2.INTER_AREA))
            classes.append(semantic[middle :: 2 * middle, middle :: 2 * middle])
            depths.append((photo.depth[middle :: 2 * middle, middle :: 2 * middle] / 256).astype(np.float16))
            for instance in np.unique(photo.instance)[1:]:
                v, u = np.nonzero(photo.instance == instance)
                if len(u) >= SEEN * half * half:
                    box = np.array([u.min(), v.min(), u.max() + 1, v.max() + 1]) / half
                    kind = np.bincount(semantic[v, u], minlength=FREE + 1).argmax()
                    objects.append([len(images) - 1, kind, *(box[:2] + box[2:]) / 2, *(box[2:] - box[:2])])
    return Pictures(np.stack(images), np.stack(classes), np.stack(depths), np.array(objects, np.float32))


def load_pictures(folder: Path, rigs: int, seed: int) -> Pictures:
    """The pictures in `folder`, made if they are not there."""
    path = folder / f"pictures-{rigs}-{seed}.npz"
    if not path.is_file():
        write_npz(path, **make_pictures(rigs, seed)._asdict())
    return Pictures(**read_npz(path, {name: (None, None) for name in Pictures._fields}))


def object_targets(pictures: Pictures, rows: np.ndarray, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """-> centre heat map (n, 10, h, w) in [0, 1], extent (n, 2, h, w) as log of cells, and where it is known."""
    n, (h, w) = len(rows), shape
    heat, extent, known = torch.zeros(n, 10, h, w), torch.zeros(n, 2, h, w), torch.zeros(n, 1, h, w)
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    for k, row in enumerate(rows):
        for _, kind, u, v, du, dv in pictures.objects[pictures.objects[:, 0] == row]:
            if not 1 <= kind <= 10:
                continue
            cu, cv, su, sv = u / STRIDE, v / STRIDE, du / STRIDE, dv / STRIDE
            spread = torch.exp(-((x - cu) / max(0.5, su / 6)) ** 2 / 2 - ((y - cv) / max(0.5, sv / 6)) ** 2 / 2)
            i, j = min(h - 1, int(cv)), min(w - 1, int(cu))
            heat[k, int(kind) - 1] = torch.maximum(heat[k, int(kind) - 1], spread)
            heat[k, int(kind) - 1, i, j] = 1
            extent[k, :, i, j] = torch.tensor([su, sv]).clamp_min(0.25).log()
            known[k, 0, i, j] = 1
    return heat, extent, known


def centre_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's focal loss: (1 - p)^2 log p at centres, (1 - y)^4 p^2 log(1 - p) elsewhere, over their number."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    there = heat == 1
    loss = torch.where(there, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
    return -loss.sum() / there.sum().clamp_min(1)


def losses(out: dict[str, Tensor], classes: Tensor, depth: Tensor, objects: tuple[Tensor, Tensor, Tensor],
           weight: Tensor) -> dict[str, Tensor]:
    """Each head's loss. classes (n, h, w), depth (n, h, w) [m], objects: `object_targets`, weight (18,)."""
    heat, extent, known = objects
    terms = {"class": F.cross_entropy(out["class"], classes, weight), "centre": 0.1 * centre_loss(out["centre"], heat),
             "extent": 0.1 * ((out["extent"] - extent).abs() * known).sum() / known.sum().clamp_min(1)}
    if "depth" in out:
        bins = torch.where(depth > 0, depth_bin(depth), -1)
        terms["depth"] = 0.5 * F.cross_entropy(out["depth"], bins, ignore_index=-1)
    return terms


def train(pictures: Pictures, depth: bool, steps: int, seed: int, batch: int = 12, rate: float = 1e-2) -> StreetEncoder:
    """Learns from all but the last tenth of the pictures, which only measure."""
    torch.manual_seed(seed)
    rng, shown = np.random.default_rng(seed), len(pictures.images) - len(pictures.images) // 10
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    classes, depths = torch.from_numpy(pictures.classes).long(), torch.from_numpy(pictures.depth).float()
    count = torch.bincount(classes[:shown].flatten(), minlength=FREE + 1).double().clamp_min(1) ** -0.5
    weight = (count / count.mean()).clamp_max(3).float()
    net = StreetEncoder(depth).train()
    optimizer = Muon(param_groups(net, rate, rate, 0.01, muon=True), lr=rate)
    bar = tqdm(range(steps), f"street{'-depth' * depth}", unit="step", leave=False)
    for step in bar:
        rows = np.sort(rng.choice(shown, batch, replace=False))
        x, y, z = images[rows].float() / 255, classes[rows], depths[rows]
        x = (x * rng.uniform(0.8, 1.2) + rng.uniform(-0.05, 0.05)).clamp(0, 1)
        targets = object_targets(pictures, rows, y.shape[1:])
        if rng.random() < 0.5:
            x, y, z, *targets = (a.flip(-1) for a in (x, y, z, *targets))
        terms = losses(net.heads(net(x)), y, z, targets, weight)
        set_lr(optimizer, schedule(step, steps, "cosine", min(20, steps // 2)))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    return net.eval()


@torch.no_grad()
def score(net: StreetEncoder, pictures: Pictures, first: int) -> dict[str, float]:
    """Scores on pictures `first` and later: mIoU of the classes there, share of cells whose depth bin is within one,
    share of objects whose centre is the strongest of its kind within a cell."""
    confusion, near, counted, found, objects = torch.zeros(18, 18), 0, 0, 0, 0
    for k in range(first, len(pictures.images)):
        x = torch.from_numpy(pictures.images[k]).permute(2, 0, 1)[None].float() / 255
        out = net.heads(net(x))
        y, z = torch.from_numpy(pictures.classes[k]).long(), torch.from_numpy(pictures.depth[k]).float()
        confusion += torch.bincount((18 * y + out["class"][0].argmax(0)).flatten(), minlength=324).view(18, 18)
        if "depth" in out:
            near += int(((out["depth"][0].argmax(0) - depth_bin(z)).abs()[z > 0] <= 1).sum())
            counted += int((z > 0).sum())
        peak = F.max_pool2d(out["centre"], 3, 1, 1)[0] == out["centre"][0]
        peak &= out["centre"][0] > 0
        for _, kind, u, v, *_ in pictures.objects[pictures.objects[:, 0] == k]:
            if 1 <= kind <= 10:
                i, j = int(v / STRIDE), int(u / STRIDE)
                found += bool(peak[int(kind) - 1, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].any())
                objects += 1
    hit, seen = confusion.diagonal(), confusion.sum(1) > 0
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit).clamp_min(1)
    scores = {"miou_2d": float(iou[seen].mean()), "centres_found": found / max(1, objects)}
    return scores | ({"depth_within_one_bin": near / counted} if counted else {})


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.foundation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures and the encoders")
    parser.add_argument("--ship", type=Path, help="folder that gets the encoders too, such as common/weights")
    parser.add_argument("--rigs", type=int, default=480, help="cars whose six cameras photograph a street")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.time()
    pictures = load_pictures(args.out, args.rigs, args.seed)
    print(f"{len(pictures.images)} photographs, {len(pictures.objects)} objects: {time.time() - begun:.0f} s")
    first = len(pictures.images) - len(pictures.images) // 10
    for depth in (False, True):
        begun, name = time.time(), f"street{'-depth' * depth}"
        net = train(pictures, depth, args.steps, args.seed)
        seconds, scores = time.time() - begun, score(net, pictures, first)
        card = {"name": name, "command": f"python -m data.foundation --rigs {args.rigs} --steps {args.steps} --seed {args.seed}",
                "commit": commit(), "train_s": round(seconds), "pictures": first, "scores": scores,
                "parameters": sum(p.numel() for p in net.parameters()), "licence": "Apache-2.0",
                "seen": "single photographs of streets of other worlds: classes, objects" + ", metric depth" * depth}
        for folder in filter(None, (args.out, args.ship)):
            save_street(folder / f"{name}.safetensors", net)
            write_json(folder / f"{name}.json", card)
        print(f"{name}: {seconds:.0f} s, {scores}")


if __name__ == "__main__":
    main()
