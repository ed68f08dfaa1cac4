"""data/driving/balanced.py and its world: balanced sentences, answers that another reader finds too."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from common.nuscenes import NuScenesOccupancy
from common.questions import ANSWERS, CLASSES, DIRECTIONS, sentences
from data.driving.balanced import FAINT, NEAR, RANGE, SEEN, balance, keyframe_questions, shown_pixels
from data.driving.city import City
from data.driving.questions import make_questions
from data.driving.traffic import wanted_speed

CAR = np.array([CLASSES.index("car")])
SINGULAR = {**{f"{name}s": name for name in CLASSES}, "buses": "bus"}


def answer(question: str, things: list[tuple[str, float, float]]) -> str:
    """Read the sentence again, without its code. things: all that show, class, x, y [m]."""
    def toward(name: str, where: str = "") -> list[float]:
        found = []
        for kind, x, y in things:
            angle = math.degrees(math.atan2(y, x)) - 60 * DIRECTIONS.index(where) if where else 0
            if name in (kind, "thing") and abs((angle + 180) % 360 - 180) <= 30:
                found.append(math.hypot(x, y))
        return sorted(found)

    where = r"(front left|front right|back left|back right|front|back)"
    if m := re.fullmatch(rf"Can I see any (.+) to the {where} of me\?", question):
        return "yes" if toward(SINGULAR[m[1]], m[2]) else "no"
    if m := re.fullmatch(rf"How many (.+) can I see to the {where} of me\?", question):
        return str(len(toward(SINGULAR[m[1]], m[2])))
    if m := re.fullmatch(rf"What is the nearest thing that I can see to the {where} of me\?", question):
        return min(CLASSES, key=lambda name: min(toward(name, m[1]), default=math.inf))
    if m := re.fullmatch(r"Can I see any (.+) within 10 m of me\?", question):
        return "yes" if toward(SINGULAR[m[1]])[0] < NEAR else "no"
    if m := re.fullmatch(r"Is the nearest (.+) nearer to me than the nearest (.+)\?", question):
        return "yes" if toward(m[1])[0] < toward(m[2])[0] else "no"
    m = re.fullmatch(r"Is the nearest (.+) to the back of the nearest (.+)\?", question)
    a, b = (min((math.hypot(x, y), x) for kind, x, y in things if kind == name) for name in m.groups())
    return "yes" if a[1] < b[1] else "no"


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_another_reader(seed):
    rng = np.random.default_rng(seed)
    n = 14
    label, xy = rng.integers(10, size=n), rng.uniform(-22, 22, (n, 2)) * (np.arange(n)[:, None] > 0) + 3
    pixels = rng.choice([3, 30, 500], n, p=[0.1, 0.1, 0.8])
    asked = keyframe_questions(label, xy, pixels)
    things = [(CLASSES[c], *place) for c, place, p in zip(label, xy, pixels) if p >= FAINT]
    assert {half for half, *_ in asked} == {"bearing", "depth"}
    assert {kind for _, kind, *_ in asked} >= {"exist", "count"}
    for _, _, question, given in asked:
        assert given in ANSWERS and answer(question, things) == given, question


def test_nothing_hangs_on_what_is_vague():
    """One car whose pixels, distance or bearing nobody can be sure of: no question names cars."""
    for xy, pixels in (((10.0, 0.0), SEEN - 1), ((RANGE + 1, 0.0), 900)):
        asked = keyframe_questions(CAR, np.array([xy]), np.array([pixels]))
        assert not [q for *_, q, a in asked if "car" in q and "to the front of" in q or a == "car"], xy
    edge = (10 * math.cos(math.radians(29)), 10 * math.sin(math.radians(29)))
    asked = keyframe_questions(CAR, np.array([edge]), np.array([900]))
    assert not [q for *_, q, _ in asked if re.search("cars .*the front( left)? of", q)]
    asked = keyframe_questions(CAR, np.array([[10.0, 0.0]]), np.array([FAINT - 1]))
    assert "yes" not in {given for *_, given in asked}  # nobody sees it


def test_every_sentence_is_balanced_and_the_halves_are_even():
    rng = np.random.default_rng(0)
    rows = [{"question": f"q{q}", "answer": str(rng.integers(q + 1)), "half": ("bearing", "depth")[q % 2]}
            for q in range(4) for _ in range(50 * (1 + q % 2))]
    kept = balance(rows, rng)
    by_text = {}
    for row in kept:
        by_text.setdefault(row["question"], Counter())[row["answer"]] += 1
    assert "q0" not in by_text and all(len(c) > 1 and len(set(c.values())) == 1 for c in by_text.values())
    halves = Counter(row["half"] for row in kept)
    assert abs(halves["depth"] - halves["bearing"]) <= 8 and all(row in rows for row in kept)


def test_a_world_has_both_sets(tiny_world, tmp_path):
    """The balanced rows are added; the others and the scorers' fields stay."""
    import shutil

    root = tmp_path / "w"
    shutil.copytree(tiny_world, root)
    version = next(path.name for path in root.glob("v1.0-*"))
    plain = json.loads(make_questions(root, version)["val"].read_bytes())["questions"]
    rows = json.loads(make_questions(root, version, balanced=True)["val"].read_bytes())["questions"]
    assert [row for row in rows if "half" not in row] == plain
    dataset = NuScenesOccupancy(root, version, "all", cache=tmp_path / "cache", parts=())
    count = int(dataset.boxes(0).instance.max()) + 1
    pixels = shown_pixels(root, dataset.camera_files(0), count)
    assert pixels.shape == (count,) and pixels.max() > SEEN


def test_the_small_tokenizer_learns_the_sentences():
    assert "Can I see any {whats} within 10 m of me?" in sentences()


def test_other_worlds_are_what_they_were():
    """A city without `shown` draws as before the option was there: rounded states of all its actors."""
    city = City([0, 61], 1.0, False, 5)
    states = np.round([actor.state(0.5)[:3] for actor in city.actors], 2)
    assert len(states) == 67 and float(np.abs(states).sum()) == pytest.approx(19480.48, abs=0.5)


def test_streets_show_how_fast_to_drive():
    assert wanted_speed("avenue", 2) == 12 and wanted_speed("residential", 1) == 6
    cities = [City([0, k], 5.5, False, k % 7, True) for k in (1, 45)]
    attributes = Counter(actor.attribute for city in cities for actor in city.actors)
    assert attributes["vehicle.stopped"] and attributes["vehicle.parked"] and attributes["cycle.with_rider"]
