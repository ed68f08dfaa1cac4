"""What can be said of a picture's objects: kind, colour, size and shape, in captions of words.

Colour is measured on pixels. Size and shape are those of the object's parts (wheels, arms, tips, windows,
riders), never of its kind. hidden: kinds that no caption names.
"""

from pathlib import Path

import numpy as np

from common.networks.tinyclip import TEMPLATES
from common.nuscenes import LIDARSEG_TO_OCC3D, OCC3D_CLASSES

OPENSET = Path(__file__).parent / "openset"
GENERIC = {  # nuScenes' own upper categories -> a word for any of their members
    "vehicle": "vehicle", "human": "human", "animal": "object", "movable_object": "object",
    "static_object": "object", "flat": "surface", "static": "structure",
}  # fmt: skip


def things():
    """lidarseg name -> function of a generator that makes such an object."""
    from data.driving import objects as o
    from data.driving.streets import CAR, LIDARSEG_NAMES, PEDESTRIAN

    grey = np.float32([0.35, 0.35, 0.35])
    makers = {
        CAR: o.car,
        o.BUS: o.bus,
        o.BENDY: lambda r: o.bus(r, o.BENDY),
        o.TRAILER: o.trailer,
        o.CONSTRUCTION: o.construction,
        o.BICYCLE: lambda r: o.bicycle(r, r.random() < 0.5),
        o.MOTORCYCLE: lambda r: o.motorcycle(r, r.random() < 0.5),
        PEDESTRIAN: o.pedestrian,
        o.CHILD: lambda r: o.pedestrian(r, o.CHILD),
        o.WORKER: lambda r: o.pedestrian(r, o.WORKER),
        o.STROLLER: o.stroller,
        o.CONE: o.cone,
        o.BARRIER: lambda r: o.barrier(r, grey * r.uniform(0.5, 2)),
        o.DEBRIS: o.debris,
        o.PUSHABLE: o.pushable,
        o.ANIMAL: o.dog,
        o.RACK: o.rack,
        LIDARSEG_NAMES.index("vehicle.truck"): o.truck,
    }
    return {LIDARSEG_NAMES[kind]: make for kind, make in makers.items()}


def shape_words(model) -> list[str]:
    """What an object's parts look like, whatever it is: 'with two wheels', 'with an arm', 'pointed', ..."""
    from data.render import BOX, BUS_BODY, CAR_CABIN, CYLINDER, ELLIPSOID, WHEEL

    p, words = model.parts, []
    wheels = int((p.material == WHEEL).sum())
    if wheels:
        words.append("with two wheels" if wheels == 2 else "with wheels")
    tilted = (np.abs(p.rotation[:, 2, 2]) < 0.995) & (p.kind == BOX)
    if (tilted & (p.half.max(1) > 1.0) & (p.half.min(1) < 0.3)).any():
        words.append("with an arm")
    if ((p.material == BUS_BODY) & (p.half[:, 0] > 2)).any():
        words.append("with many windows")
    elif (p.material == CAR_CABIN).any():
        words.append("with a cabin")
        if ((p.kind == BOX) & (p.half.min(1) > 0.8) & (p.half.max(1) > 1.4)).any():
            words.append("with a box")
    elif wheels > 2:
        words.append("without windows")
    if ((p.kind == CYLINDER) & (p.taper[:, 0] > 0.6)).any():
        words.append("pointed")
    if (p.kind == ELLIPSOID).any():
        words.append("with a body" if (model.swing != 0).any() or wheels == 0 else "with a rider")
    return words


def size_words(size: tuple[float, float, float]) -> list[str]:
    """Length, width, height [m] -> words; thresholds ours."""
    length, width, height = max(size[:2]), min(size[:2]), size[2]
    words = ["small" if length < 2.2 else "medium" if length < 5.2 else "large"]
    if height > 2.4:
        words.append("tall")
    elif height < 1.2:
        words.append("low")
    if length > 6.5 and length > 2.5 * width:
        words.append("long")
    elif width < 0.6 < length:
        words.append("thin")
    return words


def colour_word(rgb: np.ndarray) -> str:
    """Mean colour (3,) in [0, 1] -> one of nine words."""
    import colorsys

    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, rgb))
    if value < 0.2:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.65 else "grey"
    if hue < 0.03 or hue > 0.92:
        return "red"
    if hue < 0.11:
        return "orange" if saturation > 0.55 and value > 0.35 else "brown"
    return "yellow" if hue < 0.18 else "green" if hue < 0.45 else "blue"


def synonyms(kind: str, vocabulary: dict[str, list[str]]) -> list[str]:
    """Words that may name a lidarseg kind: its class's, of "others" those that fit the kind itself."""
    from data.driving.streets import ID

    words = vocabulary[OCC3D_CLASSES[LIDARSEG_TO_OCC3D[ID[kind]]]]
    if "object" not in words:
        return words
    own = [word for word in words if word != "object" and word in kind]
    return own or (["bin", "object"] if "pushable" in kind else ["object"])


def caption(fact: dict, hidden: tuple[str, ...], vocabulary: dict[str, list[str]],
            rng: np.random.Generator) -> str:
    """One sentence about a region: a random part of what is true of it. Kinds in `hidden` are never named."""
    from data.driving.streets import ID

    kind = fact["kind"]
    before = [w for w in fact["words"] if " " not in w and rng.random() < 0.6]
    after = [w for w in fact["words"] if " " in w and rng.random() < 0.7]
    if rng.random() < 0.7:
        before.append(fact["colour"])
    word = GENERIC[kind.split(".")[0]]
    if OCC3D_CLASSES[LIDARSEG_TO_OCC3D[ID[kind]]] not in hidden and rng.random() < 0.85:
        word = str(rng.choice(synonyms(kind, vocabulary)))
    return TEMPLATES[rng.integers(5)].format(" ".join([*before, word, *after]))
