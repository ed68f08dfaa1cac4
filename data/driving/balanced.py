"""Text-balanced questions beside the NuScenes-QA form: nothing in their words helps to answer them.

    rows = balanced_questions(dataset, members, rng)      # data/driving/questions.py adds them to its file

Written down before any run. The claim: occupancy supervision helps the depth half, not the bearing half.

OBJECTS   Annotations of the ten detection classes at most RANGE [m] from ego that show at least SEEN pixels
          in one camera (of 400 x 224; a quarter as many in what the small host sees). Others that show FAINT
          pixels or more are vague: a question that one of them could decide is not asked.
BALANCE   In each split every wording (a whole sentence) has each of its answers equally often. So a
          classifier of words that sees no image is right once in the number of answers. Both halves have about as many
          questions.
BEARING   half "bearing": which camera sees something, and where in the image.
            exist     "Can I see any cars to the front left of me?"
            count     "How many cars can I see to the front left of me?"   0 to 3
DEPTH     half "depth": distances are needed, too.
            object      "What is the nearest thing that I can see to the front left of me?"   by GAP [m]
            exist       "Can I see any cars within 10 m of me?"    one is in view; none is between 9 and 11 m
            comparison  "Is the nearest car nearer to me than the nearest truck?"   by GAP at least
            comparison  "Is the nearest car to the back of the nearest truck?"   in front or at the back,
                        within BESIDE degrees of each other in bearing, so that bearing alone does not decide
Directions are the six of NuScenes-QA; nothing within MARGIN degrees of a border of the asked sector.
Rows have NuScenes-QA's fields and `half`; its scorers leave them out.
"""

from collections.abc import Container
from pathlib import Path

import cv2
import numpy as np

from common.nuscenes import NuScenesOccupancy
from common.questions import BALANCED, CLASSES, DIRECTIONS

RANGE, NEAR, GAP, SEEN, FAINT = 25.0, 10.0, 2.0, 64, 16  # [m] three times, [px] twice
MARGIN, BESIDE, MOST = 3.0, 40.0, 3  # [degrees], [degrees], the largest count
PLURAL = [f"{name}es" if name == "bus" else f"{name}s" for name in CLASSES]


def shown_pixels(root: Path, files: list[str], count: int) -> np.ndarray:
    """Exact instance maps of a keyframe's images -> (count,) pixels of each instance in the camera that shows
    most.
    """
    most = np.zeros(count, np.int64)
    for name in files:
        path = root / "exact" / "instance" / Path(name).parent.name / f"{Path(name).stem}.png"
        ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        most = np.maximum(most, np.bincount(ids.ravel(), minlength=count + 1)[1 : count + 1])
    return most


def keyframe_questions(label: np.ndarray, xy: np.ndarray, pixels: np.ndarray) -> list[tuple[str, ...]]:
    """All that can be asked of a keyframe -> (half, type, question, answer).

    label (n,): row of CLASSES, xy (n, 2) [m, ego], pixels (n,) that show.
    """
    keep = (pixels >= FAINT) & (np.linalg.norm(xy, axis=1) < 2 * RANGE)
    label, xy, pixels = label[keep], xy[keep], pixels[keep]
    distance, angle = np.linalg.norm(xy, axis=1), np.degrees(np.arctan2(xy[:, 1], xy[:, 0]))
    clear = (distance <= RANGE) & (pixels >= SEEN)
    off = lambda k: np.abs((angle - 60 * k + 180) % 360 - 180)  # noqa: E731  from the middle of sector k
    asked: list[tuple[str, ...]] = []
    for k, where in enumerate(DIRECTIONS):
        inside, border = off(k) <= 30, np.abs(off(k) - 30) < MARGIN
        for c, name in enumerate(CLASSES):
            own = label == c
            if (own & (inside | border) & ~(clear & inside & ~border)).any():
                continue  # one of them is vague
            n, words = int((own & inside).sum()), {"whats": PLURAL[c], "where": where}
            asked.append(("bearing", "exist", BALANCED["any"].format(**words), "yes" if n else "no"))
            if n <= MOST:
                asked.append(("bearing", "count", BALANCED["number"].format(**words), str(n)))
        there = np.flatnonzero(inside | border)
        if len(there):
            first = there[distance[there].argmin()]
            others = there[label[there] != label[first]]
            next_one = distance[others].min() if len(others) else np.inf
            if clear[first] and not border[first] and next_one > distance[first] + GAP:
                question = BALANCED["nearest"].format(where=where)
                asked.append(("depth", "object", question, CLASSES[label[first]]))
    nearest: dict[int, int] = {}
    for c in range(len(CLASSES)):
        own = np.flatnonzero(label == c)
        if len(own) and clear[first := own[distance[own].argmin()]]:
            nearest[c] = int(first)
            if not ((distance[own] > NEAR - 1) & (distance[own] < NEAR + 1)).any():
                near = "yes" if distance[first] < NEAR else "no"
                asked.append(("depth", "exist", BALANCED["within"].format(whats=PLURAL[c]), near))
    for a, i in nearest.items():
        for b, j in nearest.items():
            if a == b:
                continue
            words = {"what": CLASSES[a], "other": CLASSES[b]}
            if abs(distance[i] - distance[j]) > GAP:
                answer = "yes" if distance[i] < distance[j] else "no"
                asked.append(("depth", "comparison", BALANCED["nearer"].format(**words), answer))
            apart = abs((angle[i] - angle[j] + 180) % 360 - 180)
            toward = np.degrees(np.arctan2(*(xy[i] - xy[j])[::-1]))
            if apart < BESIDE and min(abs(toward), 180 - abs(toward)) < 60 - MARGIN:
                answer = "yes" if abs(toward) > 90 else "no"
                asked.append(("depth", "comparison", BALANCED["behind"].format(**words), answer))
    return asked


def balance(rows: list[dict], rng: np.random.Generator) -> list[dict]:
    """Rows of one split -> those that stay: of each sentence several answers, each equally often."""
    by_text: dict[str, dict[str, list[int]]] = {}
    for k, row in enumerate(rows):
        by_text.setdefault(row["question"], {}).setdefault(row["answer"], []).append(k)
    chosen: dict[str, list] = {"bearing": [], "depth": []}  # half -> sentences -> answers -> rows
    for answers in by_text.values():
        pools = sorted(answers.values(), key=len, reverse=True)
        n = max(range(1, len(pools) + 1), key=lambda n: (n > 1) * n**2 * len(pools[n - 1]))
        if n > 1:
            even = [rng.permutation(pool)[: len(pools[n - 1])].tolist() for pool in pools[:n]]
            chosen[rows[even[0][0]]["half"]].append(even)
    sizes = {half: sum(len(pool) for pools in texts for pool in pools) for half, texts in chosen.items()}
    kept: list[int] = []
    for half, sentences in chosen.items():
        share = min(1.0, min(sizes.values()) / max(1, sizes[half]))
        kept += [k for pools in sentences for pool in pools for k in pool[: max(1, round(share * len(pool)))]]
    return [rows[k] for k in sorted(kept)]


def balanced_questions(dataset: NuScenesOccupancy, members: Container[str], split: str,
                       rng: np.random.Generator) -> list[dict]:
    """The rows of the scenes `members` of a world with exact instance maps."""
    rows = []
    for i, token in enumerate(dataset.tokens):
        if dataset.scene_names[i] in members:
            boxes = dataset.boxes(i)
            count = int(boxes.instance.max(initial=0)) + 1
            pixels = shown_pixels(dataset.root, dataset.camera_files(i), count)
            own = boxes.labels > 0
            found = keyframe_questions(boxes.labels[own].astype(int) - 1, boxes.center[own, :2],
                                       pixels[boxes.instance[own]])
            names = "half", "template_type", "question", "answer"
            same = {"split": split, "sample_token": token, "num_hop": 0}
            rows += [same | dict(zip(names, row, strict=True)) for row in found]
    return balance(rows, rng)
