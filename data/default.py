"""Which maker makes which kind of world, and where it lies unless the user names a folder; called by
common/worlds.py.
"""

from pathlib import Path

from common.worlds import WORLDS


def make_default(kind: str, out: Path | None = None, **options) -> Path:
    """Makes what `kind` names in folder `out`, unless it is there -> its folder. Kinds: see
    common/worlds.py.
    """
    if kind == "driving":
        from data.driving import make_world

        size = options.setdefault("size", "mini")
        if (
            size == "drives"
        ):  # the shortest scenes with 2 s of past and 3 s of future: 45 to train, 10 to validate
            options = {"scenes": 55, "keyframes": 12, "sweeps": 0} | options | {"size": "demo"}
        if size == "questions":
            options = {"sweeps": 0} | options
        decoys = "-decoys" * options.get("decoys", False)
        return make_world(out or WORLDS / f"driving-{size}{decoys}", **options)
    if kind == "kitti":
        from data.driving.semantickitti_writer import make_kitti_world

        size = options.setdefault("size", "mini")
        return make_kitti_world(out or WORLDS / f"kitti-{size}", **options)
    if kind == "tabletop":
        from data.tabletop import make_world

        out = out or WORLDS / f"tabletop-{options.get('demos', 30)}"
        make_world(out, **options)
        return out
    if kind == "tinyclip":
        from data.tinyclip import make_tinyclip, read_words

        hide = options.pop("hide", None)
        out = out or WORLDS / f"tinyclip-without-{Path(hide or '').stem}.safetensors"
        return make_tinyclip(out, tuple(read_words(hide)) if hide else (), **options)
    if kind == "tinyvlm":
        from data.tinyvlm import make_tinyvlm

        start = {"street": "", "street-depth": "-depth", "conv": "-conv"}[options.get("start", "street")]
        return make_tinyvlm(out or WORLDS / f"tinyvlm{start}-{options['steps']}", **options)
    raise ValueError(f"world '{kind}': one of driving, kitti, tabletop, tinyclip, tinyvlm")
