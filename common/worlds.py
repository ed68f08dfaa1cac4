"""The worlds and small encoders that a run without real data uses: the only module of common/ that imports
data/.

    root = make("driving", size="demo")        # data/worlds/driving-demo, written if it is not there
    clip = make("tinyclip", hide="data/openset/rare.txt")
"""

from pathlib import Path

WORLDS = Path("data/worlds")  # default folder of everything that is made


def make(kind: str, out: Path | str | None = None, **options) -> Path:
    """Makes what `kind` names in folder `out`, unless it is there -> its folder.

    kind       options                                        default of `out`, in WORLDS
    driving    size mini|demo|claims|drives|questions,        driving-<size>, -decoys; drives: 55 scenes of 12
               seed, decoys                                   keyframes, questions: 190 (data/driving)
    kitti      size mini|demo|claims, seed                    kitti-<size>
    tabletop   demos, seed                                    tabletop-<demos>
    tinyclip   hide (file of the kinds it never names)        the shipped one, tinyclip-without-<stem of hide>
    tinyvlm    vlm, processor, answer_loss, steps, start      tinyvlm-<steps>, tinyvlm-depth-<steps>, -conv-

    The makers take more options; see data/default.py. Raises InputError if an option is wrong, or if `out`
    holds something else.
    """
    from data.default import make_default  # here: only a run without real data needs the renderer

    return make_default(kind, None if out is None else Path(out), **options)


def noisy_maps(dataset, **options):
    """Returns the labeler `world`: a driving world's exact maps with stated errors (data/driving/label_errors.py)."""
    from data.driving.label_errors import World  # here: only a synthetic world has exact maps

    return World(dataset, **options)


def tabletop():
    """Returns the module data.tabletop: the environment, its tasks, roles, perturbations and expert."""
    from data import tabletop as module  # here: a run on real robot data does not need it

    return module


def is_world(root: Path | str) -> bool:
    """Whether a data root is one of our synthetic driving worlds."""
    return (Path(root) / "exact" / "world.json").is_file()
