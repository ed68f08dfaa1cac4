"""The words of NuScenes-QA's questions (Qian et al., AAAI 2024) and our own sentences around them.

Types, directions, statuses and the thirty answers are NuScenes-QA's. The wordings are ours:
data/driving/questions.py asks them of a synthetic world, and the tiny host of occvla.py learns its tokens
from them.
"""

from common.nuscenes import DETECTION_CLASSES

CLASSES = tuple(name.replace("_", " ") for name in DETECTION_CLASSES)
STATUS = {
    "vehicle.moving": "moving", "vehicle.stopped": "stopped", "vehicle.parked": "parked",
    "cycle.with_rider": "with rider", "cycle.without_rider": "without rider",
    "pedestrian.moving": "moving", "pedestrian.standing": "standing",
    "pedestrian.sitting_lying_down": "not standing",
}  # fmt: skip
STATUSES = tuple(dict.fromkeys(STATUS.values()))
ANSWERS = (*map(str, range(11)), "no", "yes", *CLASSES, *STATUSES)  # 30: NuScenes-QA's vocabulary
DIRECTIONS = ("front", "front left", "back left", "back", "back right", "front right")  # k: at 60 k degrees
TYPES = ("exist", "count", "object", "status", "comparison")
MOST = 10  # the largest count in the vocabulary

VEHICLES = ("bus", "car", "construction vehicle", "trailer", "truck")
STATUSES_OF = {name: ("moving", "stopped", "parked") for name in VEHICLES}
STATUSES_OF |= {name: ("with rider", "without rider") for name in ("bicycle", "motorcycle")}
STATUSES_OF |= {"pedestrian": ("moving", "standing", "not standing"), "thing": STATUSES}
# (status or "", class or "thing"): all that a question can ask for or refer to
PHRASES = tuple((status, name) for name in (*CLASSES, "thing") for status in ("", *STATUSES_OF.get(name, ())))

# form -> wordings. what, whats: a phrase, singular and plural; where, of: "front left", "the parked car";
# it, other: references such as "the bus" or "the bus to the back of me"
WORDINGS = {
    "any": ("Are there any {whats}?", "Is there a {what} in view?"),
    "any at": ("Are there any {whats} to the {where} of {of}?", "Is there a {what} to the {where} of {of}?"),
    "any like": (
        "Does another {what} have the same status as {it}?",
        "Does {it} share its status with another {what}?",
    ),
    "number": ("How many {whats} are there?", "How many {whats} are in view?"),
    "number at": (
        "How many {whats} are to the {where} of {of}?",
        "What is the number of {whats} to the {where} of {of}?",
    ),
    "number like": (
        "How many other {whats} have the same status as {it}?",
        "With how many other {whats} does {it} share its status?",
    ),
    "class": ("What is {it}?", "Which kind of object is {it}?"),
    "status": ("What is the status of {it}?", "Which status does {it} have?"),
    "same": (
        "Do {it} and {other} have the same status?",
        "Is the status of {it} the same as that of {other}?",
    ),
}

BALANCED = {  # forms of the text-balanced set (data/driving/balanced.py); no sentence of NuScenes-QA's form
    "any": "Can I see any {whats} to the {where} of me?",
    "number": "How many {whats} can I see to the {where} of me?",
    "nearest": "What is the nearest thing that I can see to the {where} of me?",
    "within": "Can I see any {whats} within 10 m of me?",
    "nearer": "Is the nearest {what} nearer to me than the nearest {other}?",
    "behind": "Is the nearest {what} to the back of the nearest {other}?",
}


def words(phrase: int, plural: bool = False) -> str:
    """Row of PHRASES -> "parked bus" or "parked buses"."""
    status, name = PHRASES[phrase]
    return f"{status} {name}".strip() + (("es" if name == "bus" else "s") if plural else "")


def sentences() -> list[str]:
    """Wordings, answers, phrases and directions: what a small tokenizer learns its words from."""
    texts = [text for wordings in WORDINGS.values() for text in wordings]
    texts += list(BALANCED.values())
    texts += [*ANSWERS, *(f" {answer}" for answer in ANSWERS)]
    texts += [f" {words(p, plural)}" for p in range(len(PHRASES)) for plural in (False, True)]
    return texts + [f" {direction} of me" for direction in DIRECTIONS]
