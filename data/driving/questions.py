"""NuScenes-QA style questions about a written world: `<root>/questions/NuScenes_{train,val}_questions.json`.

    python -m data.driving.questions --data-root DIR      # data/driving/world.py calls make_questions once at its end

Everything is read from the tables through common.nuscenes. The sentences are ours; the form of the file, the five
types, the two hops, the six directions and the thirty answers are NuScenes-QA's (Qian et al., AAAI 2024,
arXiv:2305.14836), so its readers and scorers work.

OBJECTS     The annotations of the ten detection classes with at least one LiDAR point, at most 40 m (planar) from ego:
            the occupancy grid's reach. What is further away or hidden does not exist for any question.
STATUS      The annotation's attribute: moving, stopped, parked (vehicles), with rider, without rider (cycles), moving,
            standing, not standing (pedestrians; "not standing" is sitting or lying). Barriers and cones have none.
DIRECTION   "A is to the front left of B": the angle of A - B from ego's x axis, whatever B's own heading. Sectors of 60
            degrees: front (-30, 30], front left (30, 90], back left (90, 150], back right (-150, -90], front right
            (-90, -30], back the rest; that NuScenes-QA's six are the same is assumed. "me" is ego.
            No question hangs on an object within 3 degrees of a border of the asked sector.
REFERENCE   "the parked truck" fits exactly one object; so does "the thing to the back of the parked truck".
HOPS        0: classes and statuses alone. 1: exactly one direction is used, from me or from an object.
OPEN        Words alone never decide: "the standing thing" can only be a pedestrian; a bus and a bicycle never share a
            status; neither is asked. One-hop exist and count questions ask for what the keyframe has somewhere besides
            the reference. Counts above 10 are not asked.
BALANCE     Per keyframe at most two questions of each type and hop (twenty). In every split, type and hop with yes/no
            answers (exist, comparison) yes is as frequent as no, to within one. Else the answer is drawn with weight
            1 / (1 + how often it was given), which makes rare classes, statuses and counts frequent.
            Questions whose answer was mostly another so far are preferred. Words alone still answer many (an n-gram
            classifier 57 % of the demo world's); data/driving/balanced.py is the set in which they do not.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import InputError, exit_on_input_error, read_json, scratch, write_json
from common.nuscenes import Boxes, NuScenesOccupancy, find_root, find_version
from data.driving.balanced import balanced_questions
from common.questions import CLASSES, DIRECTIONS, MOST, PHRASES, STATUS, STATUSES, STATUSES_OF, TYPES, WORDINGS, words

RANGE = 40.0  # [m]
MARGIN = 3.0  # [degrees]
PER_CELL = 2  # questions a keyframe, type and hop
DRAWN = 24  # candidates a keyframe and kind of question: a crowded keyframe costs little more than an empty one
SPLITS = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val")}
BARE = tuple(k for k, (status, name) in enumerate(PHRASES) if not status and (name == "thing" or name in STATUSES_OF))


# --- the keyframe's objects and relations --------------------------------------------------------------------------


class Reference(NamedTuple):
    """A noun phrase that fits exactly one object."""

    text: str  # "the parked car", "the thing to the back left of me"
    object: int  # row of the graph's objects
    phrase: int  # row of PHRASES
    hop: int


class Graph(NamedTuple):
    """n objects of a keyframe, P phrases, R places to look from (me first, then `named` references)."""

    name: list[str]  # n classes
    status: list[str]  # n statuses, "" for none
    fits: np.ndarray  # (P, n) bool
    named: list[Reference]  # zero-hop references
    count: np.ndarray  # (R, 6, P) how many objects fit in that direction
    doubtful: np.ndarray  # (R, 6, P) bool: one of those that decide this count is too near the sector's border
    toward: np.ndarray  # (R, 6, n) bool


def sectors(center: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects (n, 2) [m, ego] from places (R, 2) -> in that sector, near one of its borders; both (R, 6, n) bool."""
    x, y = np.moveaxis(center[None] - origin[:, None], -1, 0)  # (R, n)
    angle = np.degrees(np.arctan2(y, x))
    own = (np.ceil((angle - 30) / 60) % 6).astype(int)  # upper border included: 30 is front
    k = np.arange(6)[:, None]
    off = np.abs((angle[:, None] - 60 * k - 30 + 180) % 360 - 180)  # (R, 6, n) degrees from the sector's upper border
    off = np.minimum(off, np.roll(off, 1, axis=1))  # its lower one is the previous sector's upper
    return own[:, None] == k, off < MARGIN


def build_graph(boxes: Boxes) -> Graph:
    """Boxes of a keyframe in the reference ego -> its objects, who has a unique name, what lies in which direction."""
    distance = np.linalg.norm(boxes.center[:, :2], axis=1)
    rows = np.flatnonzero((boxes.labels > 0) & (boxes.num_lidar_pts >= 1) & (distance <= RANGE))
    name = [CLASSES[boxes.labels[k] - 1] for k in rows]
    status = [STATUS.get(boxes.attributes[k], "") for k in rows]
    things = list(zip(name, status))
    fits = np.array([[n in (a, "thing") and s in ("", b) for a, b in things] for s, n in PHRASES], bool)
    fits = fits.reshape(len(PHRASES), len(rows))
    unique = np.flatnonzero(fits.sum(1) == 1)
    named = [Reference("the " + words(p), int(fits[p].argmax()), int(p), 0) for p in unique]
    center = boxes.center[rows, :2]
    seen_from = np.array([r.object for r in named], int)
    toward, near = sectors(center, np.concatenate([np.zeros((1, 2)), center[seen_from]]))
    itself = np.arange(len(named))
    toward[1 + itself, :, seen_from] = near[1 + itself, :, seen_from] = False
    count = toward.astype(np.float32) @ fits.T.astype(np.float32)
    doubtful = near.astype(np.float32) @ fits.T.astype(np.float32) > 0
    return Graph(name, status, fits, named, count.astype(int), doubtful, toward)


def place(graph: Graph, r: int) -> str:
    return "me" if r == 0 else graph.named[r - 1].text


def related(graph: Graph, rng: np.random.Generator) -> list[Reference]:
    """One-hop references, in random order, at most DRAWN of each kind: bare, with a status, things."""
    found = np.argwhere((graph.count == 1) & ~graph.doubtful)
    out: list[Reference] = []
    kind = np.array([2 if name == "thing" else int(bool(status)) for status, name in PHRASES])[found[:, 2]]
    for k in range(3):
        for r, d, p in found[rng.permutation(np.flatnonzero(kind == k))[:DRAWN]].tolist():
            target = int((graph.toward[r, d] & graph.fits[p]).argmax())
            out.append(Reference(f"the {words(p)} to the {DIRECTIONS[d]} of {place(graph, r)}", target, p, 1))
    return out


# --- candidates ----------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A question without its final wording: a form of WORDINGS and the words for its fields."""

    form: str
    fields: tuple[tuple[str, str], ...]

    def text(self, wording: int) -> str:
        return WORDINGS[self.form][wording].format(**dict(self.fields))


def _undecided() -> np.ndarray:
    """(P, P) bool: whether the words of two phrases leave open if the statuses of what they name are the same."""
    possible = [{status} if status else set(STATUSES_OF.get(name, ())) for status, name in PHRASES]
    return np.array([[bool(a & b) and len(a | b) > 1 for b in possible] for a in possible])


UNDECIDED = _undecided()


def ask(form: str, **fields: str) -> Candidate:
    return Candidate(form, tuple(sorted(fields.items())))


def what(phrase: int) -> dict[str, str]:
    return {"what": words(phrase), "whats": words(phrase, plural=True)}


class Pool:
    """Candidates of one keyframe by (type, hop), answer and form."""

    def __init__(self):
        self.cells: dict[tuple[str, int], dict[str, dict[str, list[Candidate]]]] = {}

    def add(self, kind: str, hop: int, answer: str, candidate: Candidate) -> None:
        self.cells.setdefault((kind, hop), {}).setdefault(answer, {}).setdefault(candidate.form, []).append(candidate)


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def candidates(graph: Graph, rng: np.random.Generator) -> Pool:
    """Everything that can be asked without ambiguity (of the one-hop questions, a random choice)."""
    pool = Pool()
    ask_for_phrases(pool, graph, rng)
    ask_about_references(pool, graph, related(graph, rng))
    return pool


def ask_for_phrases(pool: Pool, graph: Graph, rng: np.random.Generator) -> None:
    """exist and count: what fits a phrase, anywhere or in a direction."""
    total = graph.fits.sum(1)
    for p, phrase in enumerate(PHRASES):
        if phrase != ("", "thing"):
            pool.add("exist", 0, yes_no(total[p] > 0), ask("any", **what(p)))
        if total[p] <= MOST:
            pool.add("count", 0, str(total[p]), ask("number", **what(p)))
    itself = graph.fits.T[[r.object for r in graph.named]] if graph.named else np.zeros((0, len(PHRASES)), bool)
    elsewhere = total - np.concatenate([np.zeros((1, len(PHRASES)), int), itself])  # (R, P) besides the reference
    clear = ~graph.doubtful & (elsewhere > 0)[:, None]  # (R, 6, P)
    for kind, form, of_answer in (
        ("exist", "any at", [("yes", clear & (graph.count > 0)), ("no", clear & (graph.count == 0))]),
        ("count", "number at", [(str(n), clear & (graph.count == n)) for n in range(MOST + 1)]),
    ):
        for answer, where in of_answer:
            found = np.flatnonzero(where)
            for i in rng.permutation(found)[:DRAWN] if len(found) > DRAWN else found:
                r, d, p = np.unravel_index(i, where.shape)
                pool.add(kind, 1, answer, ask(form, where=DIRECTIONS[d], of=place(graph, r), **what(p)))


def ask_about_references(pool: Pool, graph: Graph, chained: list[Reference]) -> None:
    """object, status, comparison, and exist and count of what shares a reference's status."""
    code = np.array([STATUSES.index(s) if s else -1 for s in graph.status], int)  # (n,)
    other = ~np.eye(len(code), dtype=bool)  # (n, n)
    same = (code[:, None] == code) & (code >= 0) & other
    alike = graph.fits[list(BARE)].astype(int) @ same.astype(int)  # (BARE, n) how many share object n's status
    present = graph.fits[list(BARE)].astype(int) @ ((code >= 0)[:, None] & other) > 0
    for it in (*graph.named, *chained):
        status, name = PHRASES[it.phrase]
        if name == "thing" and status not in ("standing", "not standing"):
            pool.add("object", it.hop, graph.name[it.object], ask("class", it=it.text))
        if code[it.object] >= 0 and not status:
            pool.add("status", it.hop, graph.status[it.object], ask("status", it=it.text))
    for it in (*graph.named, *chained[::3]):
        if code[it.object] < 0:
            continue
        for p, n, some in zip(BARE, alike[:, it.object].tolist(), present[:, it.object].tolist()):
            if some and UNDECIDED[it.phrase, p]:
                pool.add("exist", it.hop, yes_no(n > 0), ask("any like", it=it.text, what=words(p)))
                if n <= MOST:
                    pool.add("count", it.hop, str(n), ask("number like", it=it.text, whats=words(p, plural=True)))
    for first in graph.named:
        for second in (*graph.named, *chained[::2]):
            if first.object == second.object or min(code[[first.object, second.object]]) < 0:
                continue
            if UNDECIDED[first.phrase, second.phrase] and (second.hop or first.text < second.text):
                answer = yes_no(bool(same[first.object, second.object]))
                pool.add("comparison", second.hop, answer, ask("same", it=first.text, other=second.text))


# --- choice --------------------------------------------------------------------------------------------------------


class Chooser:
    """Draws a keyframe's questions; remembers a split's answers so far to even them out."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.given: Counter = Counter()  # (type, hop, answer), (candidate, answer), candidate

    def questions(self, graph: Graph) -> list[dict]:
        """-> rows without split and sample_token."""
        pool = candidates(graph, self.rng)
        rows = []
        for kind in TYPES:
            for hop in (0, 1):
                by_answer = pool.cells.get((kind, hop), {})
                for _ in range(PER_CELL):
                    answer = self.draw_answer((kind, hop), by_answer)
                    if answer is not None:
                        rows.append(self.draw((kind, hop), answer, by_answer))
        return rows

    def draw_answer(self, cell: tuple[str, int], by_answer: dict) -> str | None:
        answers = sorted(a for a, forms in by_answer.items() if any(forms.values()))
        if cell[0] in ("exist", "comparison"):  # never two more of the one than of the other
            lead = self.given[(*cell, "yes")] - self.given[(*cell, "no")]
            answers = [a for a in answers if abs(lead + (1 if a == "yes" else -1)) <= 1]
        if not answers:
            return None
        weight = np.array([1 / (1 + self.given[(*cell, a)]) for a in answers])
        return answers[self.rng.choice(len(answers), p=weight / weight.sum())]

    def draw(self, cell: tuple[str, int], answer: str, by_answer: dict) -> dict:
        """Takes one candidate out of the pool."""
        forms = by_answer[answer]
        form = str(self.rng.choice(sorted(name for name, left in forms.items() if left)))
        left = forms[form]
        few = self.rng.permutation(len(left))[:12].tolist()
        weight = []
        for k in few:
            alike = self.given[left[k], answer]
            weight.append((1 + self.given[left[k]] - alike) / (1 + alike))
        chosen = left.pop(few[self.rng.choice(len(few), p=np.array(weight) / np.sum(weight))])
        self.given.update([(*cell, answer), (chosen, answer), chosen])
        text = chosen.text(int(self.rng.integers(len(WORDINGS[form]))))
        return {"question": text, "answer": answer, "template_type": cell[0], "num_hop": cell[1]}


# --- files ---------------------------------------------------------------------------------------------------------


def make_questions(root: Path | str, version: str, seed: int = 0, balanced: bool = False) -> dict[str, Path]:
    """Writes the questions of every keyframe of the tree's train and val scenes -> {"train": path, "val": path}.

    root holds the finished tables of `version` (v1.0-mini or v1.0-trainval); same tables and seed, same bytes. A split
    without scenes gets a file without questions. balanced: with the text-balanced set beside them. Raises InputError on another version, on broken tables, and rather
    than overwriting question files that were not made here.
    """
    root = Path(root)
    if version not in SPLITS:
        raise InputError(f"{root}: questions are made for {' and '.join(SPLITS)}, not {version}")
    paths = {split: root / "questions" / f"NuScenes_{split}_questions.json" for split in ("train", "val")}
    for path in paths.values():
        if path.is_file():
            content = read_json(path)
            info = content.get("info") if isinstance(content, dict) else None
            if not isinstance(info, dict) or info.get("generator") != "data.questions":
                raise InputError(f"{path}: not made by data.questions; move it away first")
    from nuscenes.utils.splits import create_splits_scenes

    members = create_splits_scenes()
    with scratch(root / "questions") as cache:
        dataset = NuScenesOccupancy(root, version, "all", cache=cache, parts=())
        for k, (split, path) in enumerate(paths.items()):
            names = set(members[SPLITS[version][k]])
            chooser = Chooser(np.random.default_rng([seed, 7, k]))
            rows = []
            for i, token in enumerate(dataset.tokens):
                if dataset.scene_names[i] in names:
                    found = chooser.questions(build_graph(dataset.boxes(i)))
                    rows += [{"split": split, "sample_token": token, **row} for row in found]
            if balanced:
                rows += balanced_questions(dataset, names, split, np.random.default_rng([seed, 8, k]))
            info = {"generator": "data.questions", "description": "Synthetic, in NuScenes-QA's form", "range": RANGE}
            info |= {"version": version, "seed": seed}
            write_json(path, {"info": info, "split": split, "questions": rows}, indent=None)
    return paths


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    about = "Write NuScenes-QA style questions into a synthetic tree."
    parser = argparse.ArgumentParser(prog="python -m data.driving.questions", description=about)
    parser.add_argument("--data-root", type=Path, required=True, help="world written by data.driving")
    parser.add_argument("--version", help="v1.0-mini or v1.0-trainval; default: the only one present")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--balanced", action="store_true", help="the text-balanced set too (data/driving/balanced.py)")
    args = parser.parse_args(argv)
    root = find_root(args.data_root)
    for split, path in make_questions(root, find_version(root, args.version), args.seed, args.balanced).items():
        print(f"{path}: {len(read_json(path)['questions'])} {split} questions")


if __name__ == "__main__":
    main()
