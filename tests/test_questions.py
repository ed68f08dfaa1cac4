"""data/driving/questions.py: every sentence is parsed and answered again, slowly, from the raw tables, without its code."""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pyquaternion import Quaternion

from common.files import InputError
from common.nuscenes import Boxes, NuScenesOccupancy, question_files
from common.questions import ANSWERS
from data.driving.questions import Chooser, build_graph, main, make_questions

SHARED = Path(__file__).parents[1].parent / "shared"
VOCABULARY = SHARED / "real/nuscenes_qa/answer_dict.json"
CELLS = {(kind, hop) for kind in ("exist", "count", "object", "status", "comparison") for hop in (0, 1)}

# --- an independent reader of the sentences and the tables -----------------------------------------------------------

NAMES = "barrier bicycle bus car construction_vehicle motorcycle pedestrian traffic_cone trailer truck".split()
CLASS_OF = {name: name.replace("_", " ") for name in NAMES}
STATUS_OF = {
    "vehicle.moving": "moving", "vehicle.stopped": "stopped", "vehicle.parked": "parked",
    "cycle.with_rider": "with rider", "cycle.without_rider": "without rider",
    "pedestrian.moving": "moving", "pedestrian.standing": "standing", "pedestrian.sitting_lying_down": "not standing",
}  # fmt: skip
SINGULAR = {"buses": "bus"} | {f"{name}s": name for name in (*CLASS_OF.values(), "thing") if name != "bus"}
SINGULAR |= {name: name for name in SINGULAR.values()}
CENTRE = {"front": 0, "front left": 60, "back left": 120, "back": 180, "back right": 240, "front right": 300}


def either(words) -> str:
    return f"(?:{'|'.join(sorted(set(words), key=lambda word: (-len(word), word)))})"


NP = f"(?:{either(STATUS_OF.values())} )?{either(SINGULAR)}"
DIR = either(CENTRE)
HERE = f"(?:me|the {NP})"
REF = f"the {NP}(?: to the {DIR} of {HERE})?"


def unit(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


class Keyframe:
    """objects: [(class, status or None, x, y)] in ego [m], all that may be asked about."""

    def __init__(self, objects: list[tuple]):
        self.objects = objects

    def matching(self, phrase: str) -> list[int]:
        found = re.fullmatch(rf"(?:({either(STATUS_OF.values())}) )?({either(SINGULAR)})", phrase)
        status, name = found[1], SINGULAR[found[2]]
        return [k for k, o in enumerate(self.objects) if name in (o[0], "thing") and status in (None, o[1])]

    def toward(self, phrase: str, direction: str, place: str) -> list[int]:
        """Matching objects whose bearing is nearest to that direction's; none within 3 degrees of its borders."""
        here = -1 if place == "me" else self.one(place)
        x0, y0 = (0.0, 0.0) if here < 0 else self.objects[here][2:]
        found = []
        for k in self.matching(phrase):
            if k == here:
                continue
            x, y = self.objects[k][2] - x0, self.objects[k][3] - y0
            share = {name: (x * unit(a)[0] + y * unit(a)[1]) / math.hypot(x, y) for name, a in CENTRE.items()}
            off = math.degrees(math.acos(max(-1, min(1, share[direction]))))
            assert not 27.01 < off < 32.99, "too near a border"
            if max(share, key=share.get) == direction:
                found.append(k)
        return found

    def one(self, reference: str) -> int:
        """The object that a reference names; it must be the only one."""
        if found := re.fullmatch(rf"the ({NP}) to the ({DIR}) of ({HERE})", reference):
            rows = self.toward(*found.groups())
        else:
            rows = self.matching(re.fullmatch(rf"the ({NP})", reference)[1])
        assert len(rows) == 1, f"'{reference}' names {len(rows)} objects"
        return rows[0]

    def alike(self, phrase: str, reference: str) -> list[int]:
        one = self.one(reference)
        assert self.objects[one][1]
        return [k for k in self.matching(phrase) if k != one and self.objects[k][1] == self.objects[one][1]]

    def answer(self, question: str) -> tuple[str, str]:
        """-> template type, answer."""

        def reads(pattern: str) -> re.Match | None:
            pieces = {name: f"({piece})" for name, piece in (("NP", NP), ("DIR", DIR), ("HERE", HERE), ("REF", REF))}
            return re.fullmatch(pattern.format(**pieces), question)

        yes_no = {True: "yes", False: "no"}
        if m := reads(r"Are there any {NP}\?") or reads(r"Is there a {NP} in view\?"):
            return "exist", yes_no[bool(self.matching(m[1]))]
        if m := reads(r"(?:Are there any|Is there a) {NP} to the {DIR} of {HERE}\?"):
            here = [] if m[3] == "me" else [self.one(m[3])]
            assert set(self.matching(m[1])) - set(here), "asks for what is nowhere"
            return "exist", yes_no[bool(self.toward(*m.groups()))]
        if m := reads(r"Does another {NP} have the same status as {REF}\?"):
            return "exist", yes_no[bool(self.alike(m[1], m[2]))]
        if m := reads(r"Does {REF} share its status with another {NP}\?"):
            return "exist", yes_no[bool(self.alike(m[2], m[1]))]
        if m := reads(r"How many {NP} are (?:there|in view)\?"):
            return "count", str(len(self.matching(m[1])))
        if m := reads(r"(?:How many|What is the number of) {NP}(?: are)? to the {DIR} of {HERE}\?"):
            return "count", str(len(self.toward(*m.groups())))
        if m := reads(r"How many other {NP} have the same status as {REF}\?"):
            return "count", str(len(self.alike(m[1], m[2])))
        if m := reads(r"With how many other {NP} does {REF} share its status\?"):
            return "count", str(len(self.alike(m[1], m[2])))
        if m := reads(r"(?:What|Which kind of object) is {REF}\?"):
            return "object", self.objects[self.one(m[1])][0]
        if m := reads(r"What is the status of {REF}\?") or reads(r"Which status does {REF} have\?"):
            return "status", self.objects[self.one(m[1])][1]
        if m := reads(r"Do {REF} and {REF} have the same status\?") or reads(
            r"Is the status of {REF} the same as that of {REF}\?"
        ):
            a, b = self.one(m[1]), self.one(m[2])
            assert a != b and self.objects[a][1] and self.objects[b][1]
            return "comparison", yes_no[self.objects[a][1] == self.objects[b][1]]
        raise AssertionError(f"cannot read: {question}")


def keyframes_of(folder: Path) -> dict[str, Keyframe]:
    """Sample token -> what can be asked about, straight from the JSON tables."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    names = "sample sample_data ego_pose calibrated_sensor sensor sample_annotation instance category attribute".split()
    table = {name: {row["token"]: row for row in json.loads((folder / f"{name}.json").read_text())} for name in names}
    pose = {}
    for row in table["sample_data"].values():
        sensor = table["sensor"][table["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]]
        if row["is_key_frame"] and sensor["channel"] == "LIDAR_TOP":
            pose[row["sample_token"]] = table["ego_pose"][row["ego_pose_token"]]
    keyframes = {token: Keyframe([]) for token in table["sample"]}
    for row in table["sample_annotation"].values():
        ego = pose[row["sample_token"]]
        x, y, _ = Quaternion(ego["rotation"]).inverse.rotate(np.subtract(row["translation"], ego["translation"]))
        category = table["category"][table["instance"][row["instance_token"]]["category_token"]]["name"]
        name = category_to_detection_name(category)
        if name is not None and row["num_lidar_pts"] >= 1 and math.hypot(x, y) <= 40:
            status = [STATUS_OF[table["attribute"][token]["name"]] for token in row["attribute_tokens"]]
            keyframes[row["sample_token"]].objects.append((CLASS_OF[name], status[0] if status else None, x, y))
    return keyframes


def check(keyframe: Keyframe, row: dict) -> None:
    kind, answer = keyframe.answer(row["question"])
    assert (row["template_type"], row["answer"]) == (kind, answer), row
    assert row["num_hop"] == row["question"].count(" to the ")


def random_boxes(rng: np.random.Generator, count: int) -> Boxes:
    """Objects of all classes and attributes, some hidden, some too far; the label 0 stands for other categories."""
    labels = rng.integers(0, 11, count).astype(np.uint8)
    vehicle, cycle, person = ([name for name in STATUS_OF if name.startswith(k)] for k in ("veh", "cyc", "ped"))
    choice = {2: cycle, 3: vehicle, 4: vehicle, 5: vehicle, 6: cycle, 7: person, 9: vehicle, 10: vehicle}
    attributes = [str(rng.choice(choice[k])) if k in choice else "" for k in labels.tolist()]
    center = np.column_stack([rng.uniform(-32, 32, (count, 2)), rng.normal(1, 0.3, count)])
    names = [["other", *CLASS_OF][k] for k in labels.tolist()]
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, 3] = center
    return Boxes(
        center, np.ones((count, 3)), np.zeros(count), np.zeros((count, 2)), names, labels,
        [str(k) for k in range(count)], np.arange(count), rng.integers(0, 6, count), np.full(count, 4), attributes, pose,
    )  # fmt: skip


def objects_of(boxes: Boxes) -> list[tuple]:
    out = []
    for k in range(len(boxes.names)):
        x, y = boxes.center[k, :2].tolist()
        if boxes.labels[k] and boxes.num_lidar_pts[k] >= 1 and math.hypot(x, y) <= 40:
            out.append((CLASS_OF[boxes.names[k]], STATUS_OF.get(boxes.attributes[k]), x, y))
    return out


def place_box(*things: tuple[str, str, float, float, int]) -> Boxes:
    """(class, attribute, x, y, points) each."""
    boxes = random_boxes(np.random.default_rng(0), len(things))
    center = boxes.center.copy()
    center[:, :2] = [thing[2:4] for thing in things]
    labels = np.array([list(CLASS_OF).index(thing[0]) + 1 for thing in things], np.uint8)
    names, attributes = [thing[0] for thing in things], [thing[1] for thing in things]
    points = np.array([thing[4] for thing in things])
    return boxes._replace(center=center, labels=labels, names=names, attributes=attributes, num_lidar_pts=points)


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tiny_world, tmp_path_factory) -> Path:
    """A tree with the tiny world's tables alone and questions about them."""
    root = tmp_path_factory.mktemp("questions")
    shutil.copytree(tiny_world / "v1.0-mini", root / "v1.0-mini")
    make_questions(root, "v1.0-mini", seed=3)
    return root


def content(root: Path, split: str) -> dict:
    return json.loads((root / f"questions/NuScenes_{split}_questions.json").read_text())


def test_every_answer_again_from_the_tables(tables):
    keyframes = keyframes_of(tables / "v1.0-mini")
    rows = [row for split in ("train", "val") for row in content(tables, split)["questions"]]
    assert len({row["sample_token"] for row in rows}) == len(keyframes) == 6
    for row in rows:
        assert row["answer"] in ANSWERS
        check(keyframes[row["sample_token"]], row)
    assert {row["template_type"] for row in rows} == {kind for kind, _ in CELLS}
    assert {row["num_hop"] for row in rows} == {0, 1}
    per_keyframe = Counter(row["sample_token"] for row in rows)
    assert max(per_keyframe.values()) <= 20 and min(per_keyframe.values()) >= 10


def test_form_of_the_files(tables):
    from nuscenes.utils.splits import mini_train, mini_val

    scenes = {row["token"]: row["name"] for row in json.loads((tables / "v1.0-mini/scene.json").read_text())}
    samples = json.loads((tables / "v1.0-mini/sample.json").read_text())
    scene = {row["token"]: scenes[row["scene_token"]] for row in samples}
    for split, names in (("train", mini_train), ("val", mini_val)):
        value = content(tables, split)
        assert set(value) == {"info", "split", "questions"} and value["split"] == split
        for row in value["questions"]:
            assert set(row) == {"split", "sample_token", "question", "answer", "template_type", "num_hop"}
            assert row["split"] == split and scene[row["sample_token"]] in names
        texts = Counter((row["sample_token"], row["question"]) for row in value["questions"])
        assert max(texts.values()) == 1


def test_reader_returns_them(tables, tmp_path):
    assert [path.name for path in question_files(tables)] == [f"NuScenes_{s}_questions.json" for s in ("train", "val")]
    wanted = [row for split in ("train", "val") for row in content(tables, split)["questions"]]
    dataset = NuScenesOccupancy(tables, split="all", cache=tmp_path, parts=("questions",))
    found = [row for i in range(len(dataset)) for row in dataset[i].questions]
    key = lambda row: (row["sample_token"], row["question"])  # noqa: E731
    assert sorted(found, key=key) == sorted(wanted, key=key)


def test_same_seed_same_bytes(tables, tiny_world, tmp_path):
    shutil.copytree(tables / "v1.0-mini", tmp_path / "v1.0-mini")
    paths = make_questions(tmp_path, "v1.0-mini", seed=3)
    for split, path in paths.items():
        assert path.read_bytes() == (tables / f"questions/NuScenes_{split}_questions.json").read_bytes()
    main(["--data-root", str(tmp_path), "--seed", "4"])
    assert content(tmp_path, "train")["questions"] != content(tables, "train")["questions"]
    assert sorted(path.name for path in (tmp_path / "questions").iterdir()) == [path.name for path in paths.values()]
    for path in make_questions(tmp_path, "v1.0-mini", seed=0).values():  # as data.driving does, with its own seed
        assert (tiny_world / "questions" / path.name).read_bytes() == path.read_bytes()


def test_random_keyframes():
    """All thirty answers, all types and hops, yes as often as no; every answer again."""
    rng = np.random.default_rng(5)
    chooser, rows = Chooser(np.random.default_rng(6)), []
    for k in range(60):
        boxes = random_boxes(rng, int(rng.integers(0, 60)))
        found = chooser.questions(build_graph(boxes))
        keyframe = Keyframe(objects_of(boxes))
        for row in found:
            check(keyframe, row)
        assert len({row["question"] for row in found}) == len(found)
        assert max(Counter((row["template_type"], row["num_hop"]) for row in found).values(), default=0) <= 2
        rows += found
    cell = Counter((row["template_type"], row["num_hop"], row["answer"]) for row in rows)
    assert {key[:2] for key in cell} == CELLS
    for kind in ("exist", "comparison"):
        for hop in (0, 1):
            assert cell[kind, hop, "yes"] > 20 and abs(cell[kind, hop, "yes"] - cell[kind, hop, "no"]) <= 1
    answers = Counter(row["answer"] for row in rows)
    assert set(answers) == set(ANSWERS)
    for kind in ("object", "status"):  # the commonest answer is not a good guess
        given = Counter(row["answer"] for row in rows if row["template_type"] == kind)
        assert max(given.values()) < 0.3 * sum(given.values())


def test_words_alone_never_decide():
    """No comparison of statuses that the phrases fix; no object question that fits a single class."""
    rng = np.random.default_rng(8)
    chooser = Chooser(np.random.default_rng(9))
    family = {"vehicle": "bus|car|construction vehicle|trailer|truck", "cycle": "bicycle|motorcycle"}
    family |= {"person": "pedestrian"}
    fixed = {"vehicle": ("stopped", "parked"), "cycle": ("with rider", "without rider")}
    fixed |= {"person": ("standing", "not standing")}
    compared = 0
    for _ in range(40):
        for row in chooser.questions(build_graph(random_boxes(rng, 25))):
            text = row["question"]
            assert not re.fullmatch(r"(?:What|Which kind of object) is the (?:not )?standing thing\b.*", text)
            if row["template_type"] == "comparison":
                pair = re.fullmatch(f"(?:Do|Is the status of) ({REF}) (?:and|the same as that of) ({REF}).*", text)
                kinds = []
                for reference in pair.groups():
                    pattern = rf"the (?:({either(STATUS_OF.values())}) )?({either(SINGULAR)})(?: to the .*)?"
                    status, name = re.fullmatch(pattern, reference).groups()
                    group = next((g for g, names in family.items() if re.fullmatch(names, name)), None)
                    group = group or next((g for g, words in fixed.items() if status in words), None)
                    kinds.append((status, group))
                assert not all(status for status, _ in kinds), text
                groups = {group for _, group in kinds if group}
                assert len(groups) < 2 or groups == {"vehicle", "person"}, text
                for (status, group), (_, other) in (kinds, kinds[::-1]):
                    assert not (status in fixed.get(group, ()) and other not in (None, group)), text
                compared += 1
    assert compared > 60


def test_hidden_and_far_objects_do_not_exist():
    rows = Chooser(np.random.default_rng(0)).questions(build_graph(random_boxes(np.random.default_rng(0), 0)))
    found = {(row["template_type"], row["num_hop"], row["answer"]) for row in rows}  # nothing there
    assert found == {("count", 0, "0"), ("exist", 0, "no")}
    far, hidden = ("truck", "vehicle.parked", 0, 40.1, 9), ("bus", "vehicle.parked", 10, 0, 0)
    graph = build_graph(place_box(("car", "vehicle.parked", 39.9, 0, 1), far, hidden))
    assert graph.name == ["car"] and graph.status == ["parked"]
    questions = [row for seed in range(20) for row in Chooser(np.random.default_rng(seed)).questions(graph)]
    assert questions
    for row in questions:
        check(Keyframe([("car", "parked", 39.9, 0.0)]), row)


def test_directions_by_hand():
    """bearing atan2(y, x): 0, 45, 120, 180, -100, -60 degrees; the ego's axes hold for every place."""
    at = {"front": (10, 0), "front left": (7, 7), "back left": (-5, 8.66), "back": (-9, 0),
          "back right": (-1.736, -9.848), "front right": (5, -8.66)}  # fmt: skip
    names = ["car", "bus", "truck", "trailer", "motorcycle", "bicycle"]
    for x0, y0 in ((0.0, 0.0), (12.0, -6.0)):
        things = [("pedestrian", "pedestrian.standing", x0, y0, 5)]
        things += [(name, "", x0 + x, y0 + y, 5) for name, (x, y) in zip(names, at.values())]
        graph = build_graph(place_box(*things))
        origin = next(k for k, reference in enumerate(graph.named) if reference.text == "the pedestrian") + 1
        for k, (name, direction) in enumerate(zip(names, at)):
            where = ["front", "front left", "back left", "back", "back right", "front right"].index(direction)
            assert graph.toward[origin, :, 1 + k].argmax() == where and graph.toward[origin, :, 1 + k].sum() == 1
            if x0 == 0:
                assert graph.toward[0, where, 1 + k]


def test_no_question_hangs_on_a_border():
    """A car at 30.9 degrees is 0.9 from the border of front and front left: neither is asked about cars; back is."""
    car = (10 * math.cos(math.radians(30.9)), 10 * math.sin(math.radians(30.9)))
    graph = build_graph(place_box(("car", "vehicle.parked", *car, 5), ("car", "vehicle.parked", -10, 0, 5)))
    texts = {row["question"] for seed in range(60) for row in Chooser(np.random.default_rng(seed)).questions(graph)}
    asked = {m[1] for text in texts if (m := re.search(rf"to the ({DIR}) of me", text))}
    assert asked == {"back", "back left", "back right", "front right"}


def test_other_versions_and_foreign_files_are_refused(tables, tmp_path):
    with pytest.raises(InputError, match="v1.0-test"):
        make_questions(tables, "v1.0-test")
    shutil.copytree(tables / "v1.0-mini", tmp_path / "v1.0-mini")
    foreign = tmp_path / "questions/NuScenes_val_questions.json"
    foreign.parent.mkdir()
    foreign.write_text('{"info": {"version": "1.0"}, "questions": []}')
    with pytest.raises(InputError, match="not made by"):
        make_questions(tmp_path, "v1.0-mini")
    assert json.loads(foreign.read_text())["info"] == {"version": "1.0"}
    assert not (tmp_path / "questions/NuScenes_train_questions.json").exists()


def test_the_vocabulary_is_the_real_one():
    assert len(set(ANSWERS)) == len(ANSWERS) == 30
    if not VOCABULARY.is_file():
        pytest.skip("shared/real/nuscenes_qa is absent")
    assert set(ANSWERS) == set(json.loads(VOCABULARY.read_text())[0])
