"""Open-set tests of an occupancy network, on the voxels that are occupied in the ground truth's camera mask.

    1  without novel prompts: does the unknown score find the voxels of held-out classes?  AUROC, AUPR, FPR95,
       AUROC against known things and known stuff apart, beside the height of a voxel as the score
    2  with novel prompts: naming with perfect geometry (all prompts compete), choice among the held-out
       classes, zero-shot IoU end to end, retrieval by name and by description

read(frame, voxels) -> Answer        is all that a method gives for both; voxels (X, Y, Z) bool
find(frame) -> (X, Y, Z) float32     likeness of each occupied voxel to a text, for `query`; NaN elsewhere

A method that blends features names each by a suffix of its metrics: "" the blend, "_f" the network's own,
"_g" the image's. Every score stands beside its chance. Counts are kept, not voxels: memory does not grow with
the keyframes. `report` adds the scores to result.json, and their sums by scene to by_scene.npz.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import viz
from common.files import read_json, write_json, write_npz
from common.geometry import OCC3D, cast_rays, pixel_centers, unproject
from common.metrics import occupancy_confusion, openset_scores, shown
from common.nuscenes import FREE, OCC3D_CLASSES, Frame, NuScenesOccupancy
from common.train import joined, share_out

IGNORE = 255
LAST_THING = 10  # Occ3D ids up to it are things, those after it stuff
HEADS = {"both": "both heads", "language": "language head", "occupancy": "occupancy head"}
PALETTE = np.array([(196, 200, 205), (173, 187, 201), (140, 180, 200), (120, 190, 150), (190, 200, 80),
                    (240, 180, 40), (240, 110, 30), (215, 25, 40)], np.uint8)
LEVELS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)  # of a probability, between the palette's colours; ours
LEVEL_NAMES = ("under 5 %", "5 to 10 %", "10 to 20 %", "20 to 35 %", "35 to 50 %", "50 to 70 %", "70 to 90 %",
               "over 90 %")
TOP = (20, 10, 5, 2, 1, 0.5, 0.1)  # [%] of all voxels that a query ranks, for the same colours; ours
TOP_NAMES = ("the rest", *(f"top {share} %" for share in TOP))


class Answer(NamedTuple):
    """What a method predicts for one keyframe, M of its voxels asked."""

    unknown: dict[str, Tensor]  # head, "both" among them -> (M,) unknown score in [0, 1]
    alike: dict[str, Tensor]  # feature -> (M, K + J) cosine to the known classes' prompts, then the others'
    described: Tensor  # (M, J) cosine to each held-out class's description
    features: Tensor  # (M, D) unit vectors of the language head
    ids: dict[str, np.ndarray]  # feature -> (X, Y, Z) uint8 prediction with the novel prompts


Read = Callable[[Frame, np.ndarray], Answer]
Sums = dict[str, dict[str, np.ndarray]]  # metric -> scene -> (K, 2); mean over K of first / second


def hide_classes(dataset: NuScenesOccupancy, hidden: list[int]) -> NuScenesOccupancy:
    """The dataset, whose labels(i) shows the classes `hidden` as 255, which every protocol leaves out."""
    read = dataset.labels

    def labels(i: int):
        found = read(i)
        if found is None:
            return None
        return np.where(np.isin(found[0], hidden), np.uint8(IGNORE), found[0]), *found[1:]

    dataset.labels = labels
    return dataset


def report(read: Read, *, dataset: NuScenesOccupancy, indices: list[int], known: list[int], novel: list[int],
           out: Path, setting: str, drawn: list[int] = ()) -> dict[str, float]:
    """Score keyframes `indices`, print the table, draw `drawn`, add the scores to `out`; -> the metrics.

    known, novel: Occ3D ids. setting: text on language and the held-out list for the table.
    """
    metrics, sums = score(read, dataset, indices, known, novel)
    if not joined().is_main:  # one process writes
        return metrics
    add_results(out, metrics, sums)
    print_table(metrics, known, novel, setting)
    for path in draw(read, dataset, drawn, out):
        print(f"  {path}")
    return metrics


class Counts:
    """How often each half-precision value of a score occurs in each group of voxels."""

    def __init__(self):
        self.of: dict[str, Tensor] = {}

    def add(self, values: Tensor, **groups: Tensor) -> None:
        """values (M,); groups: name -> (M,) bool."""
        if values.isnan().any():
            raise ValueError(f"{int(values.isnan().sum())} of {len(values)} scores are NaN")
        bits = values.half().view(torch.int16).long()
        place = torch.where(bits < 0, -(bits & 0x7FFF), bits) + 0x8000  # in the order of the values
        for name, rows in groups.items():
            self.of[name] = self.of.get(name, 0) + place[rows].bincount(minlength=0x10000)

    def merge(self, other: "Counts") -> None:
        """Add another's counts."""
        for name, count in other.of.items():
            self.of[name] = self.of.get(name, 0) + count

    def scores(self, positive: str, *negative: str) -> dict[str, float]:
        """AUROC, AUPR and FPR95 of one group against others together."""
        unknown, known = self.of[positive], sum(self.of[name] for name in negative)
        value = torch.cat([unknown.nonzero()[:, 0], known.nonzero()[:, 0]])
        is_unknown = torch.arange(len(value)) < (unknown > 0).sum()
        return openset_scores(value, is_unknown, torch.cat([unknown[unknown > 0], known[known > 0]]))


class Totals:
    """What one scene or all keyframes add up to."""

    def __init__(self, novel: list[int]):
        self.novel = torch.tensor(novel, dtype=torch.long)
        self.counts: dict[str, Counts] = {}  # unknown score of a head, height, margin; "name 3", "words 3"
        self.end_to_end, self.naming, self.choice = {}, {}, {}  # feature -> confusion [gt, pred]
        self.voxels = torch.zeros(FREE, dtype=torch.long)

    def add(self, answer: Answer, truth: np.ndarray, camera: np.ndarray, known: list[int]) -> None:
        """One keyframe. truth (X, Y, Z) ids, camera its mask; asked were the occupied voxels in it."""
        asked = (truth < FREE) & camera
        label, prompts = torch.from_numpy(truth[asked].astype(np.int64)), torch.tensor([*known, *self.novel.tolist()])
        unknown = torch.isin(label, self.novel)
        groups = {"unknown": unknown, "thing": ~unknown & (label <= LAST_THING),
                  "stuff": ~unknown & (label > LAST_THING)}
        alike = answer.alike[""]
        margin = alike[:, len(known) :].amax(1) - alike[:, : len(known)].amax(1)
        found = answer.unknown | {"height": torch.from_numpy(np.nonzero(asked)[2]), "margin": margin}
        for name, values in found.items():
            self.counts.setdefault(name, Counts()).add(values, **groups)
        for j, c in enumerate(self.novel.tolist()):
            own = {"own": label == c, "other": label != c}
            self.counts.setdefault(f"name {j}", Counts()).add(alike[:, len(known) + j], **own)
            self.counts.setdefault(f"words {j}", Counts()).add(answer.described[:, j], **own)
        self.voxels += label.bincount(minlength=FREE)
        for kind, alike in answer.alike.items():
            chosen = self.novel[alike[unknown][:, len(known) :].argmax(1)]
            for table, rows, pred in ((self.naming, label, prompts[alike.argmax(1)]),
                                      (self.choice, label[unknown], chosen)):
                table[kind] = table.get(kind, 0) + (18 * rows + pred).bincount(minlength=324).view(18, 18)
        for kind, ids in answer.ids.items():
            matrix = occupancy_confusion(*(torch.from_numpy(x) for x in (ids, truth, camera)))
            self.end_to_end[kind] = self.end_to_end.get(kind, 0) + matrix

    def merge(self, other: "Totals") -> None:
        """Add another's."""
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counts()).merge(counts)
        for mine, theirs in ((self.end_to_end, other.end_to_end), (self.naming, other.naming),
                             (self.choice, other.choice)):
            mine |= {kind: mine.get(kind, 0) + matrix for kind, matrix in theirs.items()}
        self.voxels += other.voxels

    def sums(self, known: list[int]) -> dict[str, np.ndarray]:
        """metric -> (K, 2), of which it is the mean ratio."""
        novel, result = self.novel.tolist(), {}
        for kind, matrix in self.end_to_end.items():
            shown = matrix.clone()
            shown[self.novel] = 0  # held-out voxels are in no known score
            result |= {f"unknown_miou{kind}": union_sums(matrix, novel),
                       f"known_miou{kind}": union_sums(shown, known)}
        for kind, matrix in self.naming.items():
            result |= {f"naming_unknown{kind}": union_sums(matrix, novel),
                       f"naming_recall{kind}": recalls(matrix, novel),
                       f"choice_unknown{kind}": recalls(self.choice[kind], novel)}
        for head in [head for head in HEADS if head in self.counts]:
            value = self.counts[head].scores("unknown", "thing", "stuff")["auroc"]
            for suffix in ("", "_both") if head == "both" else (f"_{head}",):
                result[f"scene_auroc{suffix}"] = own_value(value)
        return result


def score(read: Read, dataset: NuScenesOccupancy, indices: list[int], known: list[int],
          novel: list[int]) -> tuple[dict[str, float], Sums]:
    """-> metrics, and the sums by scene that a claim bootstraps; a scene's own measure is (value, 1)."""
    rng, ids = np.random.default_rng(0), torch.tensor([*known, *novel])
    whole, chance, pool, sums = Totals(novel), 0, Pool(rng), {}
    scenes: dict[str, list[int]] = {}
    for i in indices:
        scenes.setdefault(dataset.scene_names[i], []).append(i)

    def asked_of(i: int) -> tuple[np.ndarray, ...]:
        semantics, camera, _ = dataset.labels(i)
        return semantics, camera, (semantics < FREE) & camera

    in_order = [i for keyframes in scenes.values() for i in keyframes]
    read_all = share_out(lambda i: read(dataset[i], asked_of(i)[2]), in_order)  # under torchrun each its share
    answers = iter(tqdm(read_all, "open set", len(in_order), leave=False))
    for scene, keyframes in scenes.items():
        part, own = Totals(novel), Pool(rng)
        for i in keyframes:
            (semantics, camera, asked), answer = asked_of(i), next(answers)
            part.add(answer, semantics, camera, known)
            own.add(answer.features, torch.from_numpy(semantics[asked].astype(np.int64)), 100)
            pred, truth, mask = (torch.from_numpy(x) for x in (answer.ids[""], semantics, camera))
            random = ids[torch.from_numpy(rng.integers(len(ids), size=pred.shape))]
            chance = chance + occupancy_confusion(torch.where(pred < FREE, random, FREE), truth, mask)
        diverse = homogenisation(*own.all())
        for name in ("centroid_distance", "inter_intra", "effective_rank"):
            sums.setdefault(f"scene_{name}", {})[scene] = own_value(diverse.get(name, math.nan))
        for name, value in part.sums(known).items():
            sums.setdefault(name, {})[scene] = value
        whole.merge(part)
        pool.add(*own.all(), 2000)
    metrics = unknown_scores(whole) | retrieval(whole) | homogenisation(*pool.all())
    metrics |= {name: mean_ratio(sum(parts.values())) for name, parts in sums.items()}
    metrics["unknown_miou_chance"] = mean_ratio(union_sums(chance, novel))
    u, k = metrics["unknown_miou"], metrics["known_miou"]
    metrics["harmonic"] = 2 * u * k / (u + k) if u + k > 0 else 0.0
    return {name: value for name, value in metrics.items() if np.isfinite(value)}, sums


def unknown_scores(whole: Totals) -> dict[str, float]:
    """Test 1: each head's AUROC, AUPR, FPR95, AUROC against known things and stuff; no suffix: both heads."""
    novel, voxels = whole.novel, whole.voxels
    metrics = {f"voxels_{OCC3D_CLASSES[c]}": float(voxels[c]) for c in novel}
    metrics["unknown_share"] = float(voxels[novel].sum() / voxels.sum())
    for name in [name for name in (*HEADS, "height", "margin") if name in whole.counts]:
        counts = whole.counts[name]
        found = counts.scores("unknown", "thing", "stuff")
        found |= {f"auroc_{group}s".replace("ffs", "ff"): counts.scores("unknown", group)["auroc"]
                  for group in ("thing", "stuff")}
        if name not in HEADS:
            found = {key: found[key] for key in ("auroc", "auroc_things")}
        for suffix in ("", "_both") if name == "both" else (f"_{name}",):
            metrics |= {f"{key}{suffix}": value for key, value in found.items()}
    return metrics


def retrieval(whole: Totals) -> dict[str, float]:
    """Test 2: mean average precision of finding the held-out classes by name, by description, by chance."""
    metrics, novel = {}, whole.novel
    for key, name in (("name", "name"), ("words", "description")):
        found = [whole.counts[f"{key} {j}"].scores("own", "other")["aupr"] for j in range(len(novel))]
        metrics[f"retrieval_map_{name}"] = float(np.nanmean(found)) if np.isfinite(found).any() else math.nan
    share = whole.voxels[novel] / whole.voxels.sum()
    return metrics | {"retrieval_map_chance": float(share[share > 0].mean())}


class Pool:
    """Random voxel features of each class, at most some of a class."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.kept = rng, {}

    def add(self, features: Tensor, label: Tensor, most: int) -> None:
        """features (M, D), label (M,): at most `most` of each class; a class never grows over 2,000 rows."""
        for c in label.unique().tolist():
            rows = torch.from_numpy(self.rng.permutation((label == c).nonzero()[:, 0].numpy())[:most])
            new = features[rows], torch.from_numpy(self.rng.random(len(rows)))
            both = [torch.cat(x) for x in zip(self.kept.get(c, (new[0][:0], new[1][:0])), new, strict=True)]
            first = both[1].argsort()[:2000]  # the smallest of random numbers: each row equally likely
            self.kept[c] = both[0][first], both[1][first]

    def all(self) -> tuple[Tensor, Tensor]:
        """-> (M, D), (M,)."""
        if not self.kept:
            return torch.zeros(0, 1), torch.zeros(0).long()
        label = [torch.full((len(f),), c) for c, (f, _) in self.kept.items()]
        return torch.cat([f for f, _ in self.kept.values()]), torch.cat(label)


def homogenisation(f: Tensor, label: Tensor, most: int = 200, least: int = 20,
                   seed: int = 0) -> dict[str, float]:
    """How alike voxel features of different classes are, on a class-balanced pool. f (M, D) unit, label (M,).

    centroid_distance: 1 - mean cosine between class centroids. inter_intra: mean distance between centroids
    over mean distance to the own one. effective_rank: exp of the entropy of the pool's singular values. All
    three: higher is less homogeneous. class_spread, 1 - mean cosine to the own centroid, is descriptive only:
    contrast pulls a class onto its prompt. Classes with fewer than `least` voxels stay out; {} if fewer than
    two are left.
    """
    rng, pools = np.random.default_rng(seed), {}
    for c in label.unique().tolist():
        rows = (label == c).nonzero()[:, 0].numpy()
        if len(rows) >= least:
            pools[c] = rows
    if len(pools) < 2:
        return {}
    each = min(most, *(len(rows) for rows in pools.values()))
    pool = torch.stack([f[rng.choice(rows, each, replace=False)] for rows in pools.values()]).double()
    center = pool.mean(1)  # pool (K, n, D), center (K, D)
    unit = F.normalize(center, dim=-1)
    apart = ~torch.eye(len(pool), dtype=torch.bool)
    inter, intra = torch.cdist(center, center)[apart].mean(), (pool - center[:, None]).norm(dim=-1).mean()
    share = torch.linalg.svdvals(pool.flatten(0, 1))
    share = share / share.sum()
    return {
        "centroid_distance": 1 - float((unit @ unit.t())[apart].mean()),
        "inter_intra": float(inter / intra.clamp_min(1e-9)),
        "effective_rank": float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum())),
        "class_spread": 1 - float((pool * unit[:, None]).sum(-1).mean()),
    }


def union_sums(confusion: Tensor, classes: list[int]) -> np.ndarray:
    """(18, 18) [gt, pred] -> (K, 2): intersection and union of each class; absent, not predicted: (0, 0)."""
    counts = confusion.double()
    hit, gt, pred = counts.diagonal(), counts.sum(1), counts.sum(0)
    return np.stack([[float(hit[c]), float(gt[c] + pred[c] - hit[c])] if gt[c] > 0 else [0.0, float(pred[c])]
                     for c in classes])


def recalls(confusion: Tensor, classes: list[int]) -> np.ndarray:
    """(18, 18) [gt, pred] -> (K, 2): hits and elements of each class."""
    return torch.stack([confusion.diagonal(), confusion.sum(1)], 1)[classes].double().numpy()


def own_value(value: float) -> np.ndarray:
    """A scene's own measure -> (1, 2); NaN: it has none."""
    return np.array([[value, 1.0]]) if np.isfinite(value) else np.zeros((1, 2))


def mean_ratio(sums: np.ndarray) -> float:
    """(K, 2) -> mean over K of first / second, where there is a second."""
    there = sums[:, 1] > 0
    return float((sums[there, 0] / sums[there, 1]).mean()) if there.any() else math.nan


def add_results(out: Path, metrics: dict[str, float], sums: Sums) -> None:
    """Put the scores into result.json, and their sums by scene into by_scene.npz (`ratio_<metric>`)."""
    result = read_json(out / "result.json")
    result["metrics"] |= metrics
    if (constant := result["metrics"].get("constant_miou_camera")) is not None:
        result["metrics"]["constant_known_miou"] = constant  # held-out voxels are in neither
    with np.load(out / "by_scene.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    scenes = [g.decode() for g in arrays["groups"].tolist()]
    for name, parts in sums.items():
        empty = np.zeros_like(next(iter(parts.values())))
        arrays[f"ratio_{name}"] = np.stack([parts.get(s, empty) for s in scenes]).astype(np.float64)
    write_npz(out / "by_scene.npz", **arrays)
    write_json(out / "result.json", result)


def print_table(metrics: dict[str, float], known: list[int], novel: list[int], setting: str) -> None:
    """The open-set scores, each beside its chance. Percent; `undefined` where the truth has no such voxel."""

    def line(label: str, values, chance: float | None = None) -> None:
        cells = (v if v == "" else shown(None if v is None else 100 * v)
                 for v in [*values, *([chance] if chance else [])])
        print(f"    {label:41}" + "".join(f" {cell:>8}" for cell in cells))

    def head(label: str, *titles: str) -> None:
        print(f"  {label:43}" + "".join(f"{title:>9}" for title in titles))

    counts = ", ".join(f"{OCC3D_CLASSES[c]} {metrics.get(f'voxels_{OCC3D_CLASSES[c]}', 0):.0f}" for c in novel)
    print(f"\nopen set: gt-occupied voxels in the camera mask; {setting}; held out, voxels: {counts}")
    head("1 no novel prompt, unknown against known", "AUROC", "things", "stuff", "AUPR", "FPR95")
    keys = ("auroc", "auroc_things", "auroc_stuff", "aupr", "fpr95")
    for name, label in (HEADS | {"height": "a voxel's height"}).items():
        if f"auroc_{name}" in metrics:
            line(label, [metrics.get(f"{key}_{name}") for key in keys])
    line("chance", [0.5, 0.5, 0.5, metrics.get("unknown_share"), 0.95])
    kinds = [kind for kind in ("", "_f", "_g") if not kind or f"unknown_miou{kind}" in metrics]
    head("2 novel prompts given", *("f + g", "f", "g")[: len(kinds)], "chance")
    for label, name, chance in (("naming with perfect geometry: mIoU", "naming_unknown", None),
                                ("the same: mean recall", "naming_recall", 1 / len([*known, *novel])),
                                ("choice among the held-out classes", "choice_unknown", 1 / len(novel)),
                                ("mIoU, unknown classes", "unknown_miou", metrics.get("unknown_miou_chance")),
                                ("mIoU of known ones beside them", "known_miou", None)):
        line(label, [metrics.get(name + kind) for kind in kinds], chance)
    found_by_chance = metrics.get("retrieval_map_chance")
    for label, name, chance in (("harmonic mean", "harmonic", None),
                                ("AUROC of the prompts' margin", "auroc_margin", 0.5),
                                ("retrieval mAP by name", "retrieval_map_name", found_by_chance),
                                ("by description", "retrieval_map_description", found_by_chance)):
        line(label, [metrics.get(name), *[""] * (len(kinds) - 1)], chance)
    if "inter_intra" in metrics:
        print(f"  diversity between classes: centroid distance {metrics['centroid_distance']:.3f}, "
              f"inter/intra {metrics['inter_intra']:.3f}, effective rank {metrics['effective_rank']:.1f}")


# --- pictures -----------------------------------------------------------------------------------------------


def levels(values: np.ndarray, edges: tuple[float, ...] = LEVELS) -> np.ndarray:
    """(X, Y, Z) float, NaN where nothing is -> uint8 level 0..7 by seven `edges`, 255 for NaN."""
    return np.where(np.isnan(values), IGNORE, np.searchsorted(edges, values)).astype(np.uint8)


def draw(read: Read, dataset: NuScenesOccupancy, indices: list[int], out: Path) -> list[Path]:
    """PNG sheets: ground truth beside the open-vocabulary prediction; the unknown score. -> paths."""
    paths = []
    for k, i in enumerate(indices):
        frame, (semantics, camera, _) = dataset[i], dataset.labels(i)
        name = f"{frame.scene} {frame.token[:8]}"
        ids = read(frame, np.zeros_like(camera)).ids[""]
        unknown = np.full(ids.shape, np.nan, np.float32)
        unknown[ids < FREE] = read(frame, ids < FREE).unknown["both"].numpy()
        paths += [out / "pictures" / f"{kind}_{k}_{frame.scene}.png" for kind in ("open", "unknown")]
        viz.sheet(paths[-2], frame.images, {"ground truth": semantics, "open vocabulary": ids}, mask=camera,
                  error=("ground truth", "open vocabulary"), title=f"novel prompts given: {name}")
        viz.sheet(paths[-1], frame.images, {"unknown score": levels(unknown)}, classes=LEVEL_NAMES,
                  palette=PALETTE, free=IGNORE, error=None,
                  title=f"no novel prompt: {name}\nunknown score of each occupied voxel")
    return paths


def in_sight(occupied: np.ndarray, frame: Frame) -> np.ndarray:
    """(X, Y, Z) bool: the first occupied voxel along the ray of a pixel."""
    there, seen = torch.from_numpy(occupied), torch.zeros(occupied.shape, dtype=torch.bool)
    pixels = pixel_centers(*frame.images.shape[-2:]).flatten(0, 1)
    for K, T in zip(torch.as_tensor(frame.K), torch.as_tensor(frame.T_ego_cam)):
        ends = unproject(pixels, torch.ones(len(pixels)), K, T)
        index, _, hit = cast_rays(there, T[:3, 3], ends - T[:3, 3], OCC3D)
        seen[tuple(index[hit].T)] = True
    return seen.numpy()


def query(find: Callable[[Frame], np.ndarray], text: str, *, dataset: Any, indices: list[int],
          out: Path) -> list[Path]:
    """Rank the voxels that a camera sees in all keyframes by their likeness to a text: PNG sheets, HTML; -> paths.

    Ranks, not probabilities: a text that nobody trained on is likelier than no known prompt. What stands behind
    other voxels is not ranked: it would inherit the look of what hides it.
    """
    found = []
    for i in tqdm(indices, "query", unit="keyframe", leave=False):
        frame, values = dataset[i], find(dataset[i])
        found.append((frame, np.where(np.isnan(values) | in_sight(~np.isnan(values), frame), values, -np.inf)))
    alike = np.concatenate([values[np.isfinite(values)] for _, values in found])
    edges = np.quantile(alike, 1 - np.array(TOP) / 100) if len(alike) else np.zeros(len(TOP))
    frames = [viz.ViewerFrame(f"{frame.scene} {frame.token[:8]}", {text: levels(values, edges)},
                              frame.images.numpy()) for frame, values in found]
    top = [int(np.isin(frame.panels[text], range(TOP.index(1) + 1, 8)).sum()) for frame in frames]
    slug = "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:60]
    title = (f"{text}\nwhich of {len(alike):,} voxels in sight in {len(frames)} keyframes of "
             f"{dataset.split} are most like the text")
    look = {"classes": TOP_NAMES, "palette": PALETTE, "free": IGNORE}
    paths = [out / "query" / f"{slug}.html"]
    viz.viewer(paths[0], frames, difference=None, title=title, **look)
    counts = ", ".join(f"{frame.name.split()[0]} {n}" for frame, n in zip(frames, top))
    print(f"'{text}': voxels among the 1 % most like it, by keyframe: {counts}")
    for rank, k in enumerate(sorted(range(len(frames)), key=lambda k: -top[k])[:2]):
        paths.append(out / "query" / f"{slug}_{rank}.png")
        viz.sheet(paths[-1], frames[k].images, frames[k].panels, error=None,
                  title=f"{title}\n{frames[k].name}", **look)
    return paths
