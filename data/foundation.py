"""Pre-trains the miniature image encoder: it stands for ImageNet, CLIP and metric depth models on the worlds.

    python -m data.foundation --out data/worlds/foundation                        # pictures and both encoders
    python -m data.foundation --out data/worlds/foundation --ship common/weights  # and into the repository

WHAT IT SEES    Single photographs by a car's six cameras in streets of *other* worlds. Their seed differs
    from any world that is trained or evaluated on. No scene, object or calibration carries over. In three
    quarters of the places more objects stand about, each kind equally often, so that rare ones are seen.
WHAT IT LEARNS  One convolutional encoder at a quarter of the resolution, several 1x1 heads over it: the class
    of each cell; centre and extent of each object; words: each cell's vector is next to the name of what it
    shows (any synonym, any template), each region's next to a caption of kind, colour, size and shape.
    The variant `street` knows this alone (what ImageNet, CLIP and PaliGemma know). `street-depth` learns the
    metric depth of each cell too, as a distribution over 32 bins (what a metric depth model knows). Nothing
    is learned of a second camera, of time, or of what is hidden.
WHAT IS KEPT    The encoder, its heads and the text tower in half precision, and a card: command, seed,
    commit, time, scores on fresh pictures.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.files import end_with_parent, exit_on_input_error, read_json, read_npz, write_json, write_npz
from common.networks.street import SIZE, STRIDE, StreetEncoder, depth_bin, save_street, split_words
from common.networks.tinyclip import SEED_OFFSET, TEMPLATES, read_words
from common.nuscenes import FREE, LIDARSEG_TO_OCC3D, OCC3D_CLASSES
from common.train import Muon, commit, param_groups, schedule, set_apart, set_lr
from data.captions import GENERIC, OPENSET, caption, colour_word, shape_words, size_words, synonyms, things

DRAWN, KEPT = (224, 400), SIZE  # [px] rows, columns of the photographs, and of what is learned from
SEEN = 12  # [px] of a kept photograph that an object must show to have a centre
RIGS_PER_STREET = 10
EXTRAS, EXTRA_SHARE = 14, 0.75  # more objects around a car, share of the cars that have them
REGIONS = 96  # captioned regions of a training step


class Pictures(NamedTuple):
    """n photographs and what they show, at a quarter of their resolution (h, w)."""

    images: np.ndarray  # (n, H, W, 3) uint8
    classes: np.ndarray  # (n, h, w) uint8 lidarseg kind, 255: sky
    depth: np.ndarray  # (n, h, w) float16 z-depth [m], 0: sky
    objects: np.ndarray  # (m, 6) float32: picture, Occ3D id, centre u, v, extent in u, v [px as kept]
    regions: np.ndarray  # (n, h, w) uint8: 1 + place among the picture's facts, 0: none
    facts: list[list[dict]]  # of each picture's regions, objects and surfaces: {kind, colour, words}


OCC3D_ID = np.full(256, FREE, np.uint8)  # of a lidarseg kind; sky: free
OCC3D_ID[: len(LIDARSEG_TO_OCC3D)] = LIDARSEG_TO_OCC3D


def add_objects(city, t: float, rng: np.random.Generator, decoys: bool = False) -> tuple[object, list]:
    """-> the street at time t as `photograph` reads it, with more objects about the car; their models."""
    from data.driving.objects import DECOYS
    from data.driving.streets import rot_z
    from data.render import Primitives, corners

    makers = [*things().values(), *(DECOYS if decoys else ())]
    scene, T, models, parts = city.scene(t), city.ego(t), [], []
    for _ in range(EXTRAS if rng.random() < EXTRA_SHARE else 0):
        model, around = makers[rng.integers(len(makers))](rng), rng.uniform(0, 2 * np.pi)
        far = rng.uniform(2.5, 5) + max(model.size) / 2 + 28 * rng.random() ** 1.5  # [m]
        x, y = T[:2, 3] + far * np.array([np.cos(around), np.sin(around)])
        R, z = rot_z(rng.uniform(0, 2 * np.pi)), float(city.ground.height([x], [y])[0])
        own = model.parts
        parts.append(own._replace(center=own.center @ R.T + [x, y, z], rotation=R @ own.rotation,
                                  instance=np.full(len(own.kind), len(city.actors) + len(models), np.int32)))
        models.append(model)
    if parts:
        joined = Primitives.join(parts)
        scene = scene._replace(primitives=Primitives.join([scene.primitives, joined]),
                               corners=np.concatenate([scene.corners, corners(joined)]))
    return SimpleNamespace(scene=lambda t: scene, ground=city.ground), models


def photograph_street(seed: int, street: int, rigs: int, decoys: bool = False) -> Pictures:
    """Six photographs of each of `rigs` cars in one street; decoys: of the driving world's too."""
    import cv2

    from data.driving.city import City
    from data.driving.sensors import CAMERA_LAYOUT, calibration, matrix, photograph
    from data.driving.streets import LIDARSEG_NAMES

    words = [SEED_OFFSET + seed, 2, street]
    rng, city = np.random.default_rng(words), City(words, 6.0, bool(street % 2), street % 7)
    half = DRAWN[0] // KEPT[0]
    middle = STRIDE * half // 2
    cells = np.s_[middle :: 2 * middle, middle :: 2 * middle]
    images, classes, depths, objects, regions, facts = [], [], [], [], [], []
    for _ in range(rigs):
        t, rig = float(rng.uniform(0, 6)), calibration(rng, DRAWN)
        place, extras = add_objects(city, t, rng, decoys)
        models = [actor.model for actor in city.actors] + extras
        for row in (rig[camera] for camera in CAMERA_LAYOUT):
            K, T = np.array(row["camera_intrinsic"]), city.ego(t) @ matrix(row)
            photo = photograph(place, t, K, T, DRAWN, rng, True)
            region, said = np.zeros(photo.semantic[cells].shape, np.uint8), []
            kinds = np.unique(photo.semantic[cells])
            standing = [(photo.instance == i, i) for i in np.unique(photo.instance)[1:]]
            surfaces = [((photo.semantic == kind) & (photo.instance == 0), 0) for kind in kinds[kinds < 255]]
            for mask, instance in surfaces + standing:
                kind = int(np.bincount(photo.semantic[mask], minlength=1).argmax())
                if mask[cells].sum() >= 2 and len(said) < 255:
                    model = models[instance - 1] if instance else None
                    colour = colour_word(photo.color[mask].mean(0) / 255)
                    fact = {"kind": LIDARSEG_NAMES[kind], "colour": colour}
                    shape = size_words(model.size) + shape_words(model) if model else []
                    said.append(fact | {"words": shape})
                    region[mask[cells]] = len(said)
                v, u = np.nonzero(mask)
                if instance and len(u) >= SEEN * half * half:
                    box = np.array([u.min(), v.min(), u.max() + 1, v.max() + 1]) / half
                    middle_and_size = *(box[:2] + box[2:]) / 2, *(box[2:] - box[:2])
                    objects.append([len(images), OCC3D_ID[kind], *middle_and_size])
            images.append(cv2.resize(photo.color, KEPT[::-1], interpolation=cv2.INTER_AREA))
            classes.append(photo.semantic[cells])
            depths.append((photo.depth[cells] / 256).astype(np.float16))
            regions.append(region), facts.append(said)
    boxes = np.array(objects, np.float32).reshape(-1, 6)
    return Pictures(np.stack(images), np.stack(classes), np.stack(depths), boxes, np.stack(regions), facts)


def make_pictures(rigs: int, seed: int, workers: int = 2, decoys: bool = False) -> Pictures:
    """Six photographs of each of `rigs` cars, ten cars a street; the same for any number of workers."""
    streets = [min(RIGS_PER_STREET, rigs - k) for k in range(0, rigs, RIGS_PER_STREET)]
    bar, parts = tqdm(total=rigs, desc="photographs of other worlds", unit="rig", leave=False), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        for part in pool.map(photograph_street, repeat(seed), range(len(streets)), streets, repeat(decoys)):
            part.objects[:, 0] += sum(len(p.images) for p in parts)
            parts.append(part), bar.update(len(part.images) // 6)
    *arrays, facts = zip(*parts, strict=True)
    return Pictures(*map(np.concatenate, arrays), list(chain.from_iterable(facts)))


def load_pictures(folder: Path, rigs: int, seed: int) -> Pictures:
    """The pictures in `folder`, made if they are not there."""
    path = folder / f"photographs-{rigs}-{seed}.npz"
    if not path.is_file():
        *arrays, facts = make_pictures(rigs, seed)
        write_json(path.with_suffix(".json"), facts, indent=None)
        write_npz(path, **dict(zip(Pictures._fields, arrays, strict=False)))
    arrays = read_npz(path, {name: (None, None) for name in Pictures._fields[:-1]})
    return Pictures(**arrays, facts=read_json(path.with_suffix(".json")))


# --- words --------------------------------------------------------------------------------------------------


class Names:
    """How what a cell shows may be called: groups of synonyms, each for some lidarseg kinds, sky last."""

    def __init__(self, hidden: tuple[str, ...] = ()):
        from data.driving.streets import LIDARSEG_NAMES

        self.hidden, self.words = hidden, read_words(OPENSET / "vocabulary.txt")
        self.groups: list[list[str]] = []
        self.group_of = np.full(256, -1, np.int64)  # lidarseg kind -> group, -1: none
        for kind, name in enumerate(LIDARSEG_NAMES):
            occ3d = OCC3D_CLASSES[OCC3D_ID[kind]]
            if occ3d not in hidden and name not in ("noise", "vehicle.ego"):
                words = synonyms(name, self.words)
                self.groups += [words] * (words not in self.groups)
                self.group_of[kind] = self.groups.index(words)
        self.groups.append(["sky"])
        self.group_of[255] = len(self.groups) - 1

    def vocabulary(self) -> list[str]:
        """Every word that a caption, a name or a prompt of the project can have, but for hidden names."""
        shapes = ("with two wheels", "with wheels", "with an arm", "with many windows", "with a cabin",
                  "without windows", "with a rider", "with a body", "with a box", "pointed and")
        sizes = "small medium large tall low long thin"
        colours = "black white grey red orange brown yellow green blue"
        texts = [*TEMPLATES, *GENERIC.values(), sizes, colours, *shapes, *(w for g in self.groups for w in g)]
        texts += [w for name, words in self.words.items() if name not in self.hidden for w in words]
        return sorted({word for text in texts for word in split_words(text)})

    def said(self, rng: np.random.Generator) -> list[str]:
        """One text for each group: a random synonym in a random template."""
        return [TEMPLATES[rng.integers(len(TEMPLATES))].format(rng.choice(group)) for group in self.groups]


def words_loss(words: Tensor, groups: Tensor, regions: Tensor, facts: list[list[dict]], net: StreetEncoder,
               names: Names, weight: Tensor, scale: Tensor, rng: np.random.Generator) -> Tensor:
    """Cross-entropy of each cell's name, and half of CLIP's symmetric loss between regions and captions.

    words (n, D, h, w), groups (n, h, w) of `names`, -1: none, regions (n, h, w) with their facts, weight
    (groups,). Equal captions are no negatives of each other.
    """
    named = F.normalize(words, dim=1)
    alike = scale * torch.einsum("ndhw,gd->nghw", named, net.text(names.said(rng)))
    cells = F.cross_entropy(alike, groups, weight, ignore_index=-1)
    n, D = named.shape[:2]
    flat = regions.flatten(1) + 256 * torch.arange(n)[:, None]  # (n, cells): a number for each region
    cells_first = named.flatten(2).transpose(1, 2).flatten(0, 1)
    sums = named.new_zeros(256 * n, D).index_add(0, flat.flatten(), cells_first)
    asked = [256 * k + j + 1 for k, row in enumerate(facts) for j in range(len(row))]
    things_first = sorted(asked, key=lambda a: (not facts[a // 256][a % 256 - 1]["words"], rng.random()))
    asked = things_first[:REGIONS]
    texts = [caption(facts[a // 256][a % 256 - 1], names.hidden, names.words, rng) for a in asked]
    logits = scale * F.normalize(sums[asked], dim=-1) @ net.text(texts).t()
    same = torch.tensor([[a == b for b in texts] for a in texts]).float()
    target = same / same.sum(1, keepdim=True)
    return cells + 0.25 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target))


# --- training -----------------------------------------------------------------------------------------------


def object_targets(pictures: Pictures, rows: np.ndarray, shape: tuple[int, int]) -> list[Tensor]:
    """-> centre heat map (n, 10, h, w) in [0, 1], extent (n, 2, h, w) as log of cells, where it is known."""
    n, (h, w) = len(rows), shape
    heat, extent, known = torch.zeros(n, 10, h, w), torch.zeros(n, 2, h, w), torch.zeros(n, 1, h, w)
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    for k, row in enumerate(rows):
        for _, kind, u, v, du, dv in pictures.objects[pictures.objects[:, 0] == row]:
            if not 1 <= kind <= 10:
                continue
            cu, cv, su, sv = u / STRIDE, v / STRIDE, du / STRIDE, dv / STRIDE
            far = ((x - cu) / max(0.5, su / 6)) ** 2 + ((y - cv) / max(0.5, sv / 6)) ** 2
            i, j = min(h - 1, int(cv)), min(w - 1, int(cu))
            heat[k, int(kind) - 1] = torch.maximum(heat[k, int(kind) - 1], (-far / 2).exp())
            heat[k, int(kind) - 1, i, j] = 1
            extent[k, :, i, j] = torch.tensor([su, sv]).clamp_min(0.25).log()
            known[k, 0, i, j] = 1
    return [heat, extent, known]


def centre_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's focal loss: (1 - p)^2 log p at centres, (1 - y)^4 p^2 log(1 - p) elsewhere, per centre."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    there = heat == 1
    loss = torch.where(there, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
    return -loss.sum() / there.sum().clamp_min(1)


def inverse_root(labels: Tensor, kinds: int) -> Tensor:
    """freq^-0.5 of each of `kinds` labels, mean 1, at most 3; a negative label does not count."""
    weight = torch.bincount(labels[labels >= 0], minlength=kinds).double().clamp_min(1) ** -0.5
    return (weight / weight.mean()).clamp_max(3).float()


def train(pictures: Pictures, depth: bool, steps: int, seed: int, batch: int = 12,
          rate: float = 1e-2) -> StreetEncoder:
    """Learns from all but the last tenth of the pictures, which only measure."""
    torch.manual_seed(seed)
    rng, names = np.random.default_rng(seed), Names()
    shown = len(pictures.images) - len(pictures.images) // 10
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    kinds = torch.from_numpy(OCC3D_ID[pictures.classes]).long()
    depths, regions = torch.from_numpy(pictures.depth).float(), torch.from_numpy(pictures.regions).long()
    groups = torch.from_numpy(names.group_of[pictures.classes])
    weight = inverse_root(kinds[:shown].flatten(), FREE + 1)
    name_weight = inverse_root(groups[:shown].flatten(), len(names.groups))
    net = StreetEncoder(depth, names.vocabulary()).train()
    net.scale = nn.Parameter(torch.tensor(2.3))  # log of what multiplies cosines; not kept
    parameters = param_groups(net, rate, rate, 0.01, muon=True)
    set_apart(parameters, list(net.text.parameters()), lr=0.2 * rate, base_lr=0.2 * rate, orthogonal=False)
    optimizer = Muon([group for group in parameters if group["params"]], lr=rate)
    for step in tqdm(range(steps), f"street{'-depth' * depth}", unit="step", leave=False):
        rows = np.sort(rng.choice(shown, batch, replace=False))
        x, y, z, g, r = images[rows].float() / 255, kinds[rows], depths[rows], groups[rows], regions[rows]
        gain = rng.uniform(0.75, 1.25, (batch, 1, 1, 1)) * rng.uniform(0.93, 1.07, (batch, 3, 1, 1))
        x = (x * torch.from_numpy(gain).float() + rng.uniform(-0.05, 0.05)).clamp(0, 1)
        objects = object_targets(pictures, rows, y.shape[1:])
        if rng.random() < 0.5:
            x, y, z, g, r, *objects = (a.flip(-1) for a in (x, y, z, g, r, *objects))
        heat, extent, known = objects
        out, scale = net.heads(net(x)), net.scale.exp().clamp_max(50)
        loss = F.cross_entropy(out["class"], y, weight) + 0.1 * centre_loss(out["centre"], heat)
        loss = loss + 0.1 * ((out["extent"] - extent).abs() * known).sum() / known.sum().clamp_min(1)
        facts = [pictures.facts[row] for row in rows]
        loss = loss + 0.5 * words_loss(out["words"], g, r, facts, net, names, name_weight, scale, rng)
        if depth:
            bins = torch.where(z > 0, depth_bin(z), -1)
            loss = loss + F.cross_entropy(out["depth"], bins, ignore_index=-1)
        set_lr(optimizer, schedule(step, steps, "cosine", min(50, steps // 2)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    del net.scale
    return net.eval()


@torch.no_grad()
def prompt_vectors(net: StreetEncoder, prompts: list[list[str]]) -> Tensor:
    """Words of each class -> (n, D) unit vectors, each the mean over words and templates."""
    means = [net.text([t.format(word) for word in words for t in TEMPLATES]).mean(0) for words in prompts]
    return F.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def score(net: StreetEncoder, pictures: Pictures, first: int) -> dict[str, float]:
    """Scores on pictures `first` and later: mIoU of the classes there, mean share of a class's cells whose
    nearest name of 18 is its own (naming; of the classes that LOC's lists hold out: naming_<list>, among
    their names alone: choice_<list>), share of cells whose depth bin is within one, share of objects whose
    centre is the strongest of its kind within a cell."""
    lists = {file: read_words(OPENSET / f"{file}.txt") for file in ("rare", "street")}
    novel = {file: torch.tensor([OCC3D_CLASSES.index(n) for n in words]) for file, words in lists.items()}
    choice = {file: torch.zeros(18, 2) for file in novel}  # cells of a class, and those chosen right
    confusion, called, near, counted, found, objects = torch.zeros(18, 18), torch.zeros(18, 18), 0, 0, 0, 0
    words = read_words(OPENSET / "vocabulary.txt")
    prompts = prompt_vectors(net, [words[name] for name in OCC3D_CLASSES[:-1]] + [["sky"]])
    for k in range(first, len(pictures.images)):
        x = torch.from_numpy(pictures.images[k]).permute(2, 0, 1)[None].float() / 255
        out = net.heads(net(x))
        y = torch.from_numpy(OCC3D_ID[pictures.classes[k]]).long()
        z = torch.from_numpy(pictures.depth[k]).float()
        alike = torch.einsum("dhw,gd->ghw", F.normalize(out["words"][0], dim=0), prompts)
        for matrix, guess in ((confusion, out["class"][0].argmax(0)), (called, alike.argmax(0))):
            matrix += torch.bincount((18 * y + guess).flatten(), minlength=324).view(18, 18)
        for file, ids in novel.items():
            of_list = torch.isin(y, ids)
            guess = ids[alike[ids][:, of_list].argmax(0)]
            right = torch.stack([torch.ones_like(guess), guess == y[of_list]], 1).float()
            choice[file].index_add_(0, y[of_list], right)
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
    named = called.diagonal() / called.sum(1)
    scores = {"miou_2d": float(iou[seen].mean()), "naming": float(named[seen].mean()),
              "centres_found": found / max(1, objects)}
    for file, ids in novel.items():
        there = ids[seen[ids]]
        scores[f"naming_{file}"] = float(named[there].mean())
        scores[f"choice_{file}"] = float((choice[file][there, 1] / choice[file][there, 0]).mean())
    return scores | ({"depth_within_one_bin": near / counted} if counted else {})


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.foundation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures and the encoders")
    parser.add_argument("--ship", type=Path, help="folder that gets the encoders too, such as common/weights")
    parser.add_argument("--only", choices=["street", "street-depth"], help="one of the two encoders")
    parser.add_argument("--rigs", type=int, default=400, help="cars whose six cameras photograph a street")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.time()
    pictures = load_pictures(args.out, args.rigs, args.seed)
    print(f"{len(pictures.images)} photographs, {len(pictures.objects)} objects: {time.time() - begun:.0f} s")
    first = len(pictures.images) - len(pictures.images) // 10
    for name in [args.only] if args.only else ["street", "street-depth"]:
        begun, spent = time.time(), time.process_time()
        net = train(pictures, name.endswith("depth"), args.steps, args.seed)
        cpu, seconds = time.process_time() - spent, time.time() - begun
        scores = score(net, pictures, first)
        options = f"--rigs {args.rigs} --steps {args.steps} --seed {args.seed}"
        seen = "photographs of streets of other worlds: classes, objects, captions"
        card = {"name": name, "command": f"python -m data.foundation {options}", "commit": commit(),
                "train_s": round(seconds), "train_cpu_s": round(cpu), "pictures": first, "scores": scores,
                "parameters": sum(p.numel() for p in net.parameters()), "licence": "Apache-2.0",
                "seen": seen + ", metric depth" * name.endswith("depth"),
                "not_seen": "a second camera, time, what is hidden" + ", depth" * (name == "street")}
        for folder in filter(None, (args.out, args.ship)):
            save_street(folder / f"{name}.safetensors", net)
            write_json(folder / f"{name}.json", card)
        print(f"{name}: {seconds:.0f} s, {scores}")


if __name__ == "__main__":
    main()
