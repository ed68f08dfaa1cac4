"""python -m data.driving: the command line. The rules of the world: data/driving/__init__.py."""

import argparse
from pathlib import Path

from common.files import InputError, exit_on_input_error
from data.driving.semantickitti_writer import IMAGE, make_kitti_world
from data.driving.world import SIZES, make_world


def parse_image(text: str) -> tuple[int, int]:
    """"400x224" -> (224, 400)."""
    try:
        width, height = (int(v) for v in text.lower().split("x"))
    except ValueError as error:
        raise InputError(f"--image {text}: give WIDTHxHEIGHT, as 400x224") from error
    return height, width


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.driving",
                                     description="Write the synthetic driving world as nuScenes or SemanticKITTI.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=list(SIZES), default="mini",
                        help="mini: 10 scenes x 20 keyframes; demo: 74 x 2; claims: 34 x 30 "
                             "(semantickitti: drives, 11 x 5, 34 x 5, 34 x 15)")
    parser.add_argument("--scenes", type=int, help="number of scenes (default: the size's)")
    parser.add_argument("--keyframes", type=int, help="keyframes a scene (default: the size's)")
    parser.add_argument("--sweeps", type=int,
                        help="LiDAR sweeps between two keyframes (default 2; semantickitti: always 4)")
    parser.add_argument("--camera-sweeps", type=int,
                        help="0, or 2: images of all cameras before and after each keyframe (semantickitti: of "
                             "each scan)")
    parser.add_argument("--image", help="WIDTHxHEIGHT of the images (default 400x224; semantickitti: 416x128)")
    parser.add_argument("--format", choices=["nuscenes", "semantickitti"], default="nuscenes")
    parser.add_argument("--decoys", action="store_true",
                        help="nuscenes: cherry pickers, containers and bollards, which share words with rare kinds")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if args.format == "semantickitti":
        if args.sweeps not in (None, 4):
            raise InputError(f"--sweeps {args.sweeps}: SemanticKITTI has voxels at every fifth scan; leave it out")
        if args.decoys:
            raise InputError("--decoys: for --format nuscenes only")
        image = parse_image(args.image) if args.image else IMAGE
        make_kitti_world(args.out, args.seed, args.size, args.scenes, args.keyframes, args.camera_sweeps or 0, image,
                         args.workers)
        return
    make_world(args.out, args.seed, args.size, args.scenes, args.keyframes, 2 if args.sweeps is None else args.sweeps,
               args.camera_sweeps, parse_image(args.image or "400x224"), args.workers, args.decoys)


if __name__ == "__main__":
    main()
