"""Open-set tests of an occupancy network, on the voxels that are occupied in the ground truth's camera mask.

    1  without novel prompts: does the unknown score find the voxels of held-out classes?  AUROC, AUPR, FPR95
    2  with novel prompts: zero-shot IoU of the held-out classes, retrieval by name and by description

    read(frame, voxels) -> Answer        is all that a method gives for both; voxels (X, Y, Z) bool
    find(frame) -> (X, Y, Z) float32     likeness of each occupied voxel to a text, for `query`; NaN elsewhere

Every score stands beside its chance. `report` adds the scores to result.json, and their sums by scene to
by_scene.npz.
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
from common.metrics import occupancy_confusion, openset_scores
from common.nuscenes import FREE, OCC3D_CLASSES, Frame, NuScenesOccupancy
from common.train import joined, share_out

IGNORE = 255
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
    alike: Tensor  # (M, 2 J) cosine to each held-out class's name, then to its description
    features: Tensor  # (M, D) unit vectors of the language head
    ids: np.ndarray  # (X, Y, Z) uint8 prediction with the novel prompts


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

    known, novel: Occ3D ids. setting: what the table must say about language and the held-out list.
    """
    metrics, sums = score(read, dataset, indices, known, novel)
    if not joined().is_main:  # one process writes
        return metrics
    add_results(out, metrics, sums)
    print_table(metrics, novel, setting)
    for path in draw(read, dataset, drawn, out):
        print(f"  {path}")
    return metrics


def score(read: Read, dataset: NuScenesOccupancy, indices: list[int], known: list[int],
          novel: list[int]) -> tuple[dict[str, float], Sums]:
    """-> metrics, and the sums by scene that a claim bootstraps; a scene's own measure is (value, 1)."""
    answers: list[Answer] = []
    classes, scenes, confusion, chance, pools = [], [], {}, 0, {}
    rng, ids = np.random.default_rng(0), torch.tensor([*known, *novel])

    def asked_of(i: int) -> tuple[np.ndarray, ...]:
        semantics, camera, _ = dataset.labels(i)
        return semantics, camera, (semantics < FREE) & camera

    read_all = share_out(lambda i: read(dataset[i], asked_of(i)[2]), indices)  # under torchrun each its share
    for i, answer in zip(indices, tqdm(read_all, "open set", len(indices), leave=False), strict=True):
        (semantics, camera, asked), scene = asked_of(i), dataset.scene_names[i]
        label = torch.from_numpy(semantics[asked].astype(np.int64))
        for c in label.unique().tolist():
            rows = rng.permutation((label == c).nonzero()[:, 0].numpy())[:100]
            pools.setdefault(scene, []).append((answer.features[rows], torch.full((len(rows),), c)))
        pred, truth, mask = (torch.from_numpy(x) for x in (answer.ids, semantics, camera))
        confusion[scene] = confusion.get(scene, 0) + occupancy_confusion(pred, truth, mask)
        random = ids[torch.from_numpy(rng.integers(len(ids), size=pred.shape))]
        chance = chance + occupancy_confusion(torch.where(pred < FREE, random, FREE), truth, mask)
        answers.append(answer._replace(features=None, ids=None, alike=answer.alike.half()))
        classes.append(label)
        scenes += [scene] * len(label)
    label, of_scene = torch.cat(classes), np.array(scenes)
    metrics, sums = unknown_scores(answers, label, of_scene, novel)
    for name, chosen in (("unknown_miou", novel), ("open_known_miou", known)):
        sums[name] = {s: union_sums(matrix, chosen) for s, matrix in confusion.items()}
    metrics["unknown_miou_chance"] = mean_ratio(union_sums(chance, novel))
    metrics |= retrieval(torch.cat([a.alike for a in answers]).float(), label, novel)
    of_scene = {s: [torch.cat(x) for x in zip(*parts, strict=True)] for s, parts in pools.items()}
    metrics |= homogenisation(*(torch.cat(x) for x in zip(*of_scene.values(), strict=True)))
    for s, (f, c) in of_scene.items():
        own = homogenisation(f, c)
        for name in ("centroid_distance", "inter_intra", "effective_rank"):
            value = np.array([[own[name], 1.0]]) if own else np.zeros((1, 2))
            sums.setdefault(f"scene_{name}", {})[s] = value
    metrics |= {name: mean_ratio(sum(parts.values())) for name, parts in sums.items()}
    u, k = metrics["unknown_miou"], metrics["open_known_miou"]
    metrics["harmonic"] = 2 * u * k / (u + k) if u + k > 0 else 0.0
    return {name: value for name, value in metrics.items() if np.isfinite(value)}, sums


def unknown_scores(answers: list[Answer], label: Tensor, of_scene: np.ndarray,
                   novel: list[int]) -> tuple[dict[str, float], Sums]:
    """Test 1: AUROC, AUPR and FPR95 of each head's unknown score; those without a suffix are both heads'."""
    unknown = torch.isin(label, torch.tensor(novel))
    metrics = {f"voxels_{OCC3D_CLASSES[c]}": float((label == c).sum()) for c in novel}
    metrics |= {"unknown_share": float(unknown.double().mean())}
    sums, rows = {}, {s: torch.from_numpy(of_scene == s) for s in sorted(set(of_scene))}
    for head in answers[0].unknown:
        score = torch.cat([answer.unknown[head] for answer in answers])
        by_scene = {s: openset_scores(score[r], unknown[r])["auroc"] for s, r in rows.items()}
        for suffix in ("", "_both") if head == "both" else (f"_{head}",):
            metrics |= {f"{key}{suffix}": value for key, value in openset_scores(score, unknown).items()}
            sums[f"scene_auroc{suffix}"] = {s: np.array([[v, 1.0]]) if np.isfinite(v) else np.zeros((1, 2))
                                            for s, v in by_scene.items()}
    return metrics, sums


def retrieval(alike: Tensor, label: Tensor, novel: list[int]) -> dict[str, float]:
    """Test 2: mean average precision of finding the held-out classes by name, by description, by chance."""
    metrics, J = {}, len(novel)
    for offset, name in ((0, "name"), (J, "description")):
        found = [openset_scores(alike[:, offset + j], label == c)["aupr"] for j, c in enumerate(novel)]
        metrics[f"retrieval_map_{name}"] = float(np.nanmean(found)) if np.isfinite(found).any() else math.nan
    shares = [float((label == c).double().mean()) for c in novel if (label == c).any()]
    return metrics | {"retrieval_map_chance": float(np.mean(shares or [math.nan]))}


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


def mean_ratio(sums: np.ndarray) -> float:
    """(K, 2) -> mean over K of first / second, where there is a second."""
    there = sums[:, 1] > 0
    return float((sums[there, 0] / sums[there, 1]).mean()) if there.any() else math.nan


def add_results(out: Path, metrics: dict[str, float], sums: Sums) -> None:
    """Put the scores into result.json, and their sums by scene into by_scene.npz (`ratio_<metric>`)."""
    result = read_json(out / "result.json")
    result["metrics"] |= metrics
    with np.load(out / "by_scene.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    scenes = [g.decode() for g in arrays["groups"].tolist()]
    for name, parts in sums.items():
        empty = np.zeros_like(next(iter(parts.values())))
        arrays[f"ratio_{name}"] = np.stack([parts.get(s, empty) for s in scenes]).astype(np.float64)
    write_npz(out / "by_scene.npz", **arrays)
    write_json(out / "result.json", result)


def print_table(metrics: dict[str, float], novel: list[int], setting: str) -> None:
    """The open-set scores, each beside its chance. Percent."""
    counts = ", ".join(f"{OCC3D_CLASSES[c]} {metrics[f'voxels_{OCC3D_CLASSES[c]}']:.0f}" for c in novel)
    print(f"\nopen set: gt-occupied voxels in the camera mask; {setting}; held out, voxels: {counts}")
    print("  1 no novel prompt, unknown against known     AUROC    AUPR   FPR95")
    for head, label in HEADS.items():
        if f"auroc_{head}" in metrics:
            row = [metrics[f"{key}_{head}"] for key in ("auroc", "aupr", "fpr95")]
            print(f"    {label:41}" + "".join(f"{100 * v:8.2f}" for v in row))
    print(f"    {'chance':41}{50.0:8.2f}{100 * metrics['unknown_share']:8.2f}{95.0:8.2f}")
    print("  2 novel prompts given")
    for label, name, chance in (("zero-shot mIoU, unknown classes", "unknown_miou", "unknown_miou_chance"),
                                ("mIoU of known ones beside them", "open_known_miou", ""),
                                ("harmonic mean", "harmonic", ""),
                                ("retrieval mAP by name", "retrieval_map_name", "retrieval_map_chance"),
                                ("by description", "retrieval_map_description", "retrieval_map_chance")):
        if name in metrics:
            beside = f"   chance {100 * metrics[chance]:.2f}" if chance in metrics else ""
            print(f"    {label:41}{100 * metrics[name]:8.2f}{beside}")
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
        ids = read(frame, np.zeros_like(camera)).ids
        unknown = np.full(ids.shape, np.nan, np.float32)
        unknown[ids < FREE] = read(frame, ids < FREE).unknown["both"].numpy()
        paths += [out / "pictures" / f"{kind}_{k}_{frame.scene}.png" for kind in ("open", "unknown")]
        viz.sheet(paths[-2], frame.images, {"ground truth": semantics, "open vocabulary": ids}, mask=camera,
                  error=("ground truth", "open vocabulary"), title=f"novel prompts given: {name}")
        viz.sheet(paths[-1], frame.images, {"unknown score": levels(unknown)}, classes=LEVEL_NAMES,
                  palette=PALETTE, free=IGNORE, error=None,
                  title=f"no novel prompt: {name}\nunknown score of each occupied voxel")
    return paths


def query(find: Callable[[Frame], np.ndarray], text: str, *, dataset: Any, indices: list[int],
          out: Path) -> list[Path]:
    """Rank the occupied voxels of all keyframes by their likeness to a text: PNG sheets, HTML; -> paths.

    Ranks, not probabilities: a text that nobody trained on is likelier than no known prompt.
    """
    found = [(dataset[i], find(dataset[i])) for i in tqdm(indices, "query", unit="keyframe", leave=False)]
    alike = np.concatenate([values[~np.isnan(values)] for _, values in found])
    edges = np.quantile(alike, 1 - np.array(TOP) / 100) if len(alike) else np.zeros(len(TOP))
    frames = [viz.ViewerFrame(f"{frame.scene} {frame.token[:8]}", {text: levels(values, edges)},
                              frame.images.numpy()) for frame, values in found]
    top = [int(np.isin(frame.panels[text], range(TOP.index(1) + 1, 8)).sum()) for frame in frames]
    slug = "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:60]
    title = (f"{text}\nwhich of {len(alike):,} occupied voxels in {len(frames)} keyframes of "
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
