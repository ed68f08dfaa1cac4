"""2D label makers behind one interface: a keyframe in, a semantic map and a metric depth map per camera out.

    labeler = make_labeler("lidar", dataset)     # world | foundation | lidar | files
    maps = labeler(i)                            # Maps of dataset frame i, cameras in CAMERAS order
    labeler.note                                 # text on these labels for the protocol line

    world        a synthetic world's exact maps with stated errors (data/driving/label_errors.py)
    foundation   GroundingDINO + SAM with OccNeRF's prompts, and a metric depth model; can keep its maps
    lidar        projected LiDAR points, classes from lidarseg, or from boxes and a ground plane; no model
    files        maps that any tool wrote

Two more classes make a semantic map alone, for methods that merge several (OccLE): `Segmenter`, a
segmentation network trained on a dataset's classes, and `OpenVocabulary`, GroundingDINO + SAM2 asked for
classes by name; `TwoSources` is such a pair from any labeler. `PromptedMasks` makes masks of the objects that
a robot's instruction names.

THE MAPS FORMAT, for `files`, the synthetic world's exact/ and the cache of `foundation`
    <folder>/semantic/<CAMERA>/<stem>.png   8 bits: Occ3D id 0..16, 17 = sky, uncertain or unlabelled
    <folder>/depth/<CAMERA>/<stem>.png      16 bits: round(256 z) of the z-depth in [m], 0 = none (KITTI's)
    Maps have one channel. <stem> is the image file's name without suffix. A map shows the image's whole field
    of view, at any resolution. The maps of one kind and keyframe have one size; semantic and depth may differ
    (the class of a depth pixel is that at its centre). LOC and OccLE read no depth. SemanticKITTI's maps keep
    the image's whole path below the root (<folder>/semantic/sequences/00/image_2/000005.png) and hold train
    ids 1..19, 255 = no label.

ANY SEGMENTER'S MAPS in ten lines: `names` are its classes, `to_occ3d` your table of them.
    from PIL import Image; import numpy as np
    from common.labelers import write_semantic
    from common.nuscenes import OCC3D_CLASSES, NuScenesOccupancy
    to_occ3d = {"road": "driveable_surface", "person": "pedestrian", "building": "manmade"}  # others: 17
    table = np.array([OCC3D_CLASSES.index(to_occ3d.get(name, "free")) for name in names], np.uint8)
    dataset = NuScenesOccupancy("data/nuscenes", split="train", parts=())
    for i in range(len(dataset)):
        files = dataset.camera_files(i)
        maps = np.stack([table[segment(Image.open(dataset.root / file))] for file in files])  # (6, h, w)
        write_semantic("maps", files, maps)
    A metric depth model's maps likewise: write_semantic("maps", files, quantize(depth), "depth").
"""

import functools
import hashlib
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import worlds
from common.backbones import IMAGENET_MEAN, IMAGENET_STD
from common.files import (InputError, grey16, open_image, read_image, read_json, reason, write_bytes,
                          write_json)
from common.nuscenes import FREE, NuScenesOccupancy
from common.pretrained import load_pretrained


class Maps(NamedTuple):
    """2D labels of one keyframe, N cameras in CAMERAS order; numpy.

    A labeler that measures points (lidar) sets `points` and `labels`. A fusion uses them *instead of*
    back-projecting `depth`, because they carry no rasterisation error. `semantic` and `depth` then hold the
    same points for 2D losses.
    """

    semantic: np.ndarray  # (N, h, w) uint8 Occ3D id 0..16; 17: sky, uncertain, no label
    depth: np.ndarray  # (N, h, w) float32 z-depth [m], 0: none
    points: np.ndarray | None = None  # (M, 3) float32 [m] in the reference ego
    labels: np.ndarray | None = None  # (M,) uint8 Occ3D id 0..16


def make_labeler(name: str, dataset: NuScenesOccupancy, **options):
    """-> labeler, called with a dataset index -> Maps; it has a `.note` (str).

    Options: see `Foundation`, `Lidar`, `Files`, and `World` in data/driving/label_errors.py. Raises
    InputError if the name, an option's value, a model or a file is wrong or missing.
    """
    makers = {"world": worlds.noisy_maps, "foundation": Foundation, "lidar": Lidar, "files": Files}
    if name not in makers:
        raise InputError(f"labeler '{name}': one of {', '.join(makers)}")
    return makers[name](dataset, **options)


def number_of(*parts) -> int:
    """A 64-bit number that depends on the parts' text alone, for seeds."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scale_K(K: np.ndarray, size: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """K (N, 3, 3) of (H, W) images -> K of `new` (H, W) images."""
    return K * np.array([new[1] / size[1], new[0] / size[0], 1])[:, None]


# --- the maps format ----------------------------------------------------------------------------------------

DEPTH_SCALE = 256  # PNG counts per metre
DEPTH_MAX = 65535 / DEPTH_SCALE  # [m] what the format can hold; larger depths are stored as this


def map_paths(folder: Path | str, kind: str, camera_files: list[str]) -> list[Path]:
    """Paths of the `kind` (semantic, depth, instance) maps of images "samples/<CAMERA>/<stem>.jpg".

    SemanticKITTI's images "sequences/<seq>/image_2/<stem>.png" keep their path.
    """
    paths = []
    for name in map(Path, camera_files):
        place = name.parent if name.parts[0] == "sequences" else name.parent.name
        paths.append(Path(folder) / kind / place / f"{name.stem}.png")
    return paths


def read_map(path: Path, bits: int) -> np.ndarray:
    """One PNG -> (h, w) uint8 or uint16. InputError if it is missing, broken, or has other channels or other
    bits."""
    with open_image(path, "map") as image:
        if bits == 16:
            return grey16(image)
        if image.mode not in ("L", "P"):
            raise InputError(f"{path}: PIL mode '{image.mode}', expected {bits} bits and one channel")
        return np.asarray(image)


def read_stack(paths: list[Path], bits: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """PNGs of one size (h, w) -> (N, h, w)."""
    maps = [read_map(path, bits) for path in paths]
    h, w = shape or maps[0].shape
    for path, values in zip(paths, maps, strict=True):
        if values.shape != (h, w):
            size = f"{values.shape[1]}x{values.shape[0]}"
            raise InputError(f"{path}: {size} px, the keyframe's other maps {w}x{h}")
    return np.stack(maps)


def read_maps(folder: Path | str, camera_files: list[str], image_shape: tuple[int, int],
              depth: bool = True) -> Maps:
    """One keyframe in the maps format, at the depth's size. depth False: none is read, all is 0 (none).

    `image_shape` (H, W): its aspect ratio must be the maps' within 2 %.
    """
    found = {"semantic": read_semantic(folder, camera_files, range(FREE), FREE)}
    if depth:
        found["depth"] = read_stack(map_paths(folder, "depth", camera_files), 16)
    for kind, maps in found.items():
        h, w = maps.shape[1:]
        if abs(w * image_shape[0] / (h * image_shape[1]) - 1) > 0.02:
            path, size = map_paths(folder, kind, camera_files)[0], f"{image_shape[1]}x{image_shape[0]}"
            raise InputError(f"{path}: {w}x{h} px has another shape than the {size} image; maps show the "
                             "whole image")
    H, W = found["semantic"].shape[1:]  # h, w: the size of the depth, if there is one
    at = np.ix_(((np.arange(h) + 0.5) * H / h).astype(int), ((np.arange(w) + 0.5) * W / w).astype(int))
    semantic = found["semantic"][:, *at]
    metres = found.get("depth", np.zeros(semantic.shape, np.uint16)) * np.float32(1 / DEPTH_SCALE)
    return Maps(semantic, metres)


def read_semantic(folder: Path | str, camera_files: list[str], classes: range, none: int,
                  kind: str = "semantic") -> np.ndarray:
    """One keyframe's `kind` maps -> (N, h, w) uint8; InputError on an id that is neither of `classes` nor
    `none`."""
    paths = map_paths(folder, kind, camera_files)
    semantic = read_stack(paths, 8)
    for path, values in zip(paths, semantic, strict=True):
        wrong = (values != none) & ((values < classes.start) | (values >= classes.stop))
        if wrong.any():
            ids = f"{classes.start}..{classes.stop - 1}, and {none} for no label"
            raise InputError(f"{path}: id {values[wrong][0]}, expected {ids}")
    return semantic


def write_semantic(folder: Path | str, camera_files: list[str], maps: np.ndarray,
                   kind: str = "semantic") -> None:
    """Writes one keyframe's (N, h, w) values as `kind` maps, each file whole or not at all."""
    from PIL import Image

    for path, one in zip(map_paths(folder, kind, camera_files), maps, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG", compress_level=1)
        write_bytes(path, buffer.getvalue())


def quantize(depth: np.ndarray) -> np.ndarray:
    """[m] -> uint16 counts of the maps format. Depths beyond DEPTH_MAX become it; negative and nan become 0
    (none)."""
    counts = np.rint(np.clip(np.nan_to_num(depth, nan=0, posinf=DEPTH_MAX), 0, DEPTH_MAX) * DEPTH_SCALE)
    return counts.astype(np.uint16)


def write_maps(folder: Path | str, camera_files: list[str], maps: Maps) -> None:
    """Writes one keyframe in the maps format, each file whole or not at all."""
    write_semantic(folder, camera_files, maps.semantic)
    write_semantic(folder, camera_files, quantize(maps.depth), "depth")


class Files:
    """Maps that any tool wrote, in the maps format, from folder `maps`. depth: whether they are needed."""

    def __init__(self, dataset: NuScenesOccupancy, maps: Path | str | None = None, depth: bool = True):
        if maps is None:
            raise InputError("labeler files: which folder? give --maps FOLDER (format: common/labelers.py)")
        self.dataset, self.folder, self.depth = dataset, Path(maps), depth
        kinds = ("semantic", "depth") if depth else ("semantic",)
        for kind in kinds:
            if not (self.folder / kind).is_dir():
                needed = " and ".join(f"{one}/" for one in kinds)
                raise InputError(f"{self.folder / kind}: no such folder; --maps needs {needed} inside")
        self.note = f"2D maps read from {self.folder}"

    def __call__(self, i: int) -> Maps:
        """Maps of frame i."""
        files = self.dataset.camera_files(i)
        return read_maps(self.folder, files, self.dataset.image_shape, self.depth)


# --- lidar --------------------------------------------------------------------------------------------------

EGO_BODY = (-0.9, 3.6), (-1.0, 1.0)  # [m] x, y around the ego origin: the car itself (4.08 x 1.73 m)
MIN_DEPTH = 1.0  # [m] nearer points are not projected, as in the devkit
GROUND_BAND = 0.3  # [m] a point this near the fitted plane is road
LIDARSEG_NOISE, LIDARSEG_EGO = 0, 31  # nuScenes-lidarseg's own ids


class Lidar:
    """The keyframe's own LiDAR points as maps (z-buffered, sparse) and as points.

    scale      maps have scale x the image's height and width. On a real keyframe at 1600x900 (0.5, 0.25) a
               map keeps 99.99 % (99.93, 99.72) of the projected points. Back-projecting it misses them by a
               median of 3.5 mm (7, 14), 95 % within 19 mm (37, 72): half a pixel. `points` are exact.
    seen_only  keep only points inside at least one camera's image (False: all, in `points`)

    Classes come from lidarseg if the tree has it (noise and ego points are dropped). Else they come from the
    boxes: the smallest that holds the point counts, and a box of none of the ten detection classes is 0
    'others'. Outside boxes a point is driveable surface within 0.3 m of a fitted ground plane, 0 otherwise.
    `note` names the source. Points on the ego's own body are dropped.
    """

    def __init__(self, dataset: NuScenesOccupancy, scale: float = 1.0, seen_only: bool = True):
        self.dataset, self.scale, self.seen_only = dataset, scale, seen_only
        self.note = "LiDAR points, classes from "
        if len(dataset) > 0 and dataset.lidarseg(0) is not None:
            self.note += "lidarseg"
        else:
            self.note += f"boxes; outside boxes driveable surface within {GROUND_BAND} m of a fitted plane, "
            self.note += "else 'others'"

    def __call__(self, i: int) -> Maps:
        dataset = self.dataset
        points = dataset.points(i)[:, :3]
        raw = dataset.lidarseg(i, raw=True)
        if raw is not None:
            labels = dataset.lidarseg(i)
            keep = (raw != LIDARSEG_NOISE) & (raw != LIDARSEG_EGO)
        else:
            labels, keep = None, np.ones(len(points), bool)
        (x0, x1), (y0, y1) = EGO_BODY
        keep &= ~((points[:, 0] > x0) & (points[:, 0] < x1) & (points[:, 1] > y0) & (points[:, 1] < y1))
        points = points[keep]
        if labels is None:
            boxes = dataset.boxes(i)
            labels = box_labels(points, boxes.T_ego_box, boxes.size, boxes.labels)
            rest = labels == FREE
            a, b, c = fit_ground(points[rest], number_of(0, "ground", dataset.tokens[i]))
            height = points[rest] @ np.array([-a, -b, 1], np.float32) - np.float32(c)
            labels[rest] = np.where(np.abs(height) <= GROUND_BAND * math.sqrt(a * a + b * b + 1), 11, 0)
        else:
            labels = labels[keep]
        h, w = (max(1, round(self.scale * n)) for n in dataset.image_shape)
        K, T_ego_cam, _ = dataset.calibration(i)
        semantic, depth, seen = rasterize(points, labels, scale_K(K, dataset.image_size, (h, w)), T_ego_cam,
                                          h, w)
        kept = seen if self.seen_only else np.ones(len(points), bool)
        return Maps(semantic, depth, points[kept], labels[kept])


def box_labels(points: np.ndarray, T_ego_box: np.ndarray, size: np.ndarray, label: np.ndarray) -> np.ndarray:
    """points (M, 3), T_ego_box (B, 4, 4), size (B, 3) width, length, height [m], label (B,) -> (M,) uint8
    label of the smallest box that holds the point, 17 outside all."""
    result = np.full(len(points), FREE, np.uint8)
    for b in np.argsort(-size.prod(1), kind="stable"):  # large first, so that the smallest wins
        near = np.flatnonzero(np.abs(points - T_ego_box[b, :3, 3]).max(1) <= 0.5 * np.linalg.norm(size[b]))
        local = np.abs((points[near] - T_ego_box[b, :3, 3]) @ T_ego_box[b, :3, :3])  # (m, 3) along the box
        result[near[(local <= size[b][[1, 0, 2]] / 2).all(1)]] = label[b]
    return result


def fit_ground(points: np.ndarray, seed: int, rounds: int = 256) -> tuple[float, float, float]:
    """RANSAC plane z = a x + b y + c through points (M, 3) [m] near the ego's height; ours.

    Candidates: within 1 m of z = 0 and 25 m of the ego. A plane steeper than 10 degrees, or through fewer
    than 100 of them (within 0.15 m), is no ground: then z = 0.
    """
    p = points[(np.abs(points[:, 2]) < 1) & (np.hypot(points[:, 0], points[:, 1]) < 25)].astype(np.float64)
    if len(p) < 100:
        return 0.0, 0.0, 0.0
    ground = np.column_stack([p[:, :2], np.ones(len(p))])  # (m, 3)
    pick = np.random.Generator(np.random.PCG64(seed)).integers(len(p), size=(rounds, 3))
    system = ground[pick]  # (rounds, 3, 3)
    usable = np.abs(np.linalg.det(system)) > 1  # twice the triangle's area [m^2]: no slivers
    if not usable.any():
        return 0.0, 0.0, 0.0
    planes = np.linalg.solve(system[usable], p[pick[usable], 2][..., None])[..., 0]  # (R, 3)
    planes = planes[np.hypot(planes[:, 0], planes[:, 1]) < math.tan(math.radians(10))]
    if not len(planes):
        return 0.0, 0.0, 0.0
    inliers = [int((np.abs(ground @ plane - p[:, 2]) < 0.15).sum()) for plane in planes]
    plane = planes[int(np.argmax(inliers))]
    for _ in range(2):  # least squares through the inliers, twice
        near = np.abs(ground @ plane - p[:, 2]) < 0.15
        if near.sum() < 100:
            return 0.0, 0.0, 0.0
        plane = np.linalg.lstsq(ground[near], p[near, 2], rcond=None)[0]
    return tuple(float(value) for value in plane)


def rasterize(points: np.ndarray, labels: np.ndarray, K: np.ndarray, T_ego_cam: np.ndarray, h: int, w: int,
              none: int = FREE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """points (M, 3) [m] ego, labels (M,), K (N, 3, 3), T_ego_cam (N, 4, 4) -> semantic (N, h, w) uint8
    (`none` where no point is), depth (N, h, w) float32 [m] of the nearest point in each pixel, seen (M,)
    bool: inside at least one image."""
    semantic, depth = np.full((len(K), h, w), none, np.uint8), np.zeros((len(K), h, w), np.float32)
    seen = np.zeros(len(points), bool)
    for n in range(len(K)):
        rotation, origin = T_ego_cam[n, :3, :3].astype(np.float64), T_ego_cam[n, :3, 3]
        local = (points - origin) @ rotation  # p_cam = R^T (p - t)
        front = np.flatnonzero(local[:, 2] > MIN_DEPTH)
        image = local[front] @ K[n].T
        u, v = (np.floor(image[:, k] / image[:, 2]).astype(np.int64) for k in range(2))
        inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
        front, u, v = front[inside], u[inside], v[inside]
        order = np.argsort(-local[front, 2], kind="stable")  # far first: the nearest point is written last
        front, u, v = front[order], u[order], v[order]
        semantic[n, v, u], depth[n, v, u] = labels[front], local[front, 2]
        seen[front] = True
    return semantic, depth, seen


# --- foundation: Grounded-SAM semantics and metric depth ----------------------------------------------------

# OccNeRF's vocabulary (GroundedSAM_OccNeRF), one run a prompt; a phrase is a detection's text tokens above
# threshold.
PROMPTS = (
    "pedestrian.", "bus.", "truck.", "bicycle, bicyclist.", "motorcycle, motorcyclist.",
    "barrier, barricade.", "sedan, highway, terrain, tree, sidewalk, building, bridge, pole, billboard, "
    "light, ashbin, crane, trailer, cone, sky.",
)
PHRASES = {  # phrase -> Occ3D id; other_flat and others have none
    "barrier": 1, "barricade": 1, "bicycle": 2, "bicyclist": 2, "bus": 3, "sedan": 4, "crane": 5,
    "motorcycle": 6, "motorcyclist": 6, "pedestrian": 7, "person": 7, "cone": 8, "trailer": 9, "truck": 10,
    "highway": 11, "sidewalk": 13, "terrain": 14, "building": 15, "bridge": 15, "pole": 15, "billboard": 15,
    "light": 15, "ashbin": 15, "tree": 16, "sky": FREE,
}  # fmt: skip
GROUNDING = "IDEA-Research/grounding-dino-base"  # Swin-B, OccNeRF's
SAM = "facebook/sam-vit-huge"  # OccNeRF's
METRIC_DEPTH = "depth-anything/Depth-Anything-V2-Metric-Outdoor-Large-hf"  # metric, and transformers has it
BOX_THRESHOLD = TEXT_THRESHOLD = 0.20  # OccNeRF's
BATCH = 6  # images per forward pass of the grounding and the depth model; SAM encodes one image at a time
CHUNK = 16  # boxes per forward pass of a mask decoder: it bounds the memory

METRIC3D_SIZE = (616, 1064)  # [px] height, width that Metric3Dv2's ViT models take
METRIC3D_FOCAL = 1000.0  # [px] of its canonical camera
METRIC3D_MEAN, METRIC3D_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB of 0..255


class Foundation:
    """2D foundation models on the native images.

    grounding, sam   hub id or local folder; None: OccNeRF's, from this machine only (no download)
    depth            the same, a transformers metric depth model; or "metric3d[:FOLDER]": Metric3Dv2 giant
                     through torch.hub from FOLDER, or from torch.hub's own cache
    cache_maps       folder that keeps each keyframe's maps in the maps format; they are read back from there
    device           torch device; None: cuda if there is one
    """

    def __init__(self, dataset: NuScenesOccupancy, grounding: str | None = None, sam: str | None = None,
                 depth: str | None = None, cache_maps: Path | str | None = None, device: str | None = None):
        self.dataset, self.device = dataset, _device(device)
        names = {"grounding": grounding or GROUNDING, "sam": sam or SAM, "depth": depth or METRIC_DEPTH}
        self.note = f"2D maps by {names['grounding']} + {names['sam']}, depth by {names['depth']}"
        self.cache = None if cache_maps is None else Path(cache_maps)
        settings = {"labeler": "foundation", **names, "prompts": list(PROMPTS), "note": self.note}
        settings |= {"box_threshold": BOX_THRESHOLD, "text_threshold": TEXT_THRESHOLD}
        if self.cache is not None:
            _check_cache(self.cache, settings)
        self.grounding = _load("grounding", names["grounding"], not grounding, self.device)
        self.sam = _load("sam", names["sam"], not sam, self.device)
        self.depth_of = load_depth(names["depth"], not depth, self.device)
        if self.cache is not None:
            write_json(self.cache / "maps.json", settings)

    def __call__(self, i: int) -> Maps:
        """Maps of frame i."""
        files = self.dataset.camera_files(i)
        kept = [path for kind in ("semantic", "depth") for path in map_paths(self.cache or "", kind, files)]
        if self.cache is not None and all(path.is_file() for path in kept):
            return read_maps(self.cache, files, self.dataset.image_shape)
        images = _photos(self.dataset, i)
        K = scale_K(self.dataset.calibration(i)[0], self.dataset.image_size, images[0].shape[:2])
        semantic, depth = [], []
        for k in range(0, len(images), BATCH):
            part = images[k : k + BATCH]
            for image, (boxes, scores, ids) in zip(part, self.detect(part), strict=True):
                masks = sam_masks(*self.sam, image, boxes)
                semantic.append(paint(masks, scores, ids, image.shape[:2], FREE))
            depth.append(self.depth_of(part, K[k : k + BATCH]))
        # the format's own rounding, so that a run that reads its cache gives the same labels
        maps = Maps(np.stack(semantic), quantize(np.concatenate(depth)) * np.float32(1 / DEPTH_SCALE))
        if self.cache is not None:
            write_maps(self.cache, files, maps)
        return maps

    def detect(self, images: list[np.ndarray]) -> list[tuple[torch.Tensor, list[float], list[int]]]:
        """-> per image: boxes (n, 4) xyxy [px], n scores and n ids of the detections whose phrase has a
        class."""
        found = [(torch.zeros(0, 4), [], []) for _ in images]
        for prompt in PROMPTS:
            results = find_boxes(*self.grounding, images, prompt)
            for k, ((boxes, scores, ids), result) in enumerate(zip(found, results, strict=True)):
                labels = phrase_ids(result["text_labels"])
                known = [j for j, label in enumerate(labels) if label is not None]
                scores += result["scores"][known].tolist()
                ids += [labels[j] for j in known]
                found[k] = torch.cat([boxes, result["boxes"][known].cpu()]), scores, ids
        return found


def phrase_ids(phrases: list[str]) -> list[int | None]:
    """Decoded phrases -> Occ3D ids; None for a phrase that is not in the dictionary (such as two words in
    one)."""
    return [PHRASES.get(phrase.replace(".", "").strip().lower()) for phrase in phrases]


def find_boxes(model, processor, images: list[np.ndarray], text: str,
               threshold: float = BOX_THRESHOLD) -> list[dict]:
    """GroundingDINO on images (H, W, 3) uint8 RGB of one size -> per image a dict of boxes (n, 4) xyxy [px],
    scores (n,) and n text_labels.

    text: "sedan, tree. bus."
    """
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    sizes = [image.shape[:2] for image in images]
    return processor.post_process_grounded_object_detection(outputs, inputs.input_ids, threshold=threshold,
                                                            text_threshold=TEXT_THRESHOLD, target_sizes=sizes)


def sam_masks(model, processor, image: np.ndarray, boxes: torch.Tensor):
    """SAM on an image (H, W, 3) uint8 RGB: yields the mask (H, W) bool of each of the boxes (n, 4) xyxy
    [px]."""
    if not len(boxes):
        return
    inputs = processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
    with torch.inference_mode():
        embedding = model.get_image_embeddings(inputs["pixel_values"].to(model.device))
        prompt = inputs["input_boxes"].to(model.device, torch.float32)  # (1, n, 4)
        for part in prompt.split(CHUNK, dim=1):
            out = model(image_embeddings=embedding, input_boxes=part, multimask_output=False)
            sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
            yield from processor.post_process_masks(out.pred_masks, *sizes)[0][:, 0]


def paint(masks, scores: list[float], ids: list[int], shape: tuple[int, int], none: int) -> np.ndarray:
    """n masks (H, W) bool -> (H, W) uint8: the id of the largest mask * score, `none` where no mask is.

    Of equal scores the first wins, as with OccNeRF's argmax.
    """
    best, label = np.zeros(shape, np.float32), np.full(shape, none, np.uint8)
    for mask, score, one in zip(masks, scores, ids, strict=True):
        won = mask.cpu().numpy() & (best < np.float32(score))
        best[won], label[won] = score, one
    return label


def _check_cache(folder: Path, settings: dict) -> None:
    """A cache folder belongs to one set of models and thresholds (its maps.json): maps of two never mix."""
    path = folder / "maps.json"
    if path.is_file():
        made = read_json(path)
        made = made if isinstance(made, dict) else {}
        if different := [name for name in settings if made.get(name) != settings[name]]:
            raise InputError(f"{path}: made with another {different[0]}; use another folder for the maps' "
                             "cache")
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"{folder}: not empty and without maps.json; give an empty folder for the maps' "
                         "cache")


def _photos(dataset, i: int) -> list[np.ndarray]:
    """Frame i's native images, (H, W, 3) uint8 RGB each, of one size."""
    paths = [Path(dataset.root) / name for name in dataset.camera_files(i)]
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise InputError(f"{path}: {size} px, unlike the keyframe's first image")
    return images


def _device(name: str | torch.device | None) -> torch.device:
    if str(name).startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


MODELS = {  # flag, classes of transformers, model_type of config.json
    "grounding": ("--grounding", ("GroundingDinoForObjectDetection", "AutoProcessor"), "grounding-dino"),
    "sam": ("--sam", ("SamModel", "SamProcessor"), "sam"),
    "sam2": ("--sam", ("Sam2Model",), ("sam2", "sam2_video")),
}


@functools.lru_cache(maxsize=3)  # one copy a process, however many labelers it makes
def _load(kind: str, name: str, local_only: bool, device) -> list:
    """-> a model of MODELS, and its processor."""
    import transformers

    flag, classes, model_type = MODELS[kind]
    classes = [getattr(transformers, one) for one in classes]
    model, *rest = load_pretrained(flag, name, *classes, model_type=model_type, local_only=local_only)
    return [model.to(device).eval(), *rest]


@functools.lru_cache(maxsize=1)
def load_depth(name: str, local_only: bool, device):
    """-> depth(images [(H, W, 3) uint8 RGB], K (n, 3, 3) at their size) -> (n, H, W) float32 z-depth [m]."""
    if name == "metric3d" or name.startswith("metric3d:"):
        return _load_metric3d(name.partition(":")[2], device)

    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    classes = (AutoModelForDepthEstimation, AutoImageProcessor)
    model, processor = load_pretrained("--depth-model", name, *classes, local_only=local_only)
    if getattr(model.config, "depth_estimation_type", "metric") != "metric":
        remedy = f"metres need a metric model, such as {METRIC_DEPTH}"
        raise InputError(f"--depth-model {name}: predicts relative depth; {remedy}")
    model = model.to(device).eval()

    def depth(images: list[np.ndarray], K: np.ndarray) -> np.ndarray:
        sizes = [image.shape[:2] for image in images]
        inputs = processor(images=images, return_tensors="pt").to(device)
        with torch.inference_mode():
            outputs = model(**inputs)
        padded = {"source_sizes": sizes} if model.config.model_type == "zoedepth" else {}
        results = processor.post_process_depth_estimation(outputs, target_sizes=sizes, **padded)
        return torch.stack([one["predicted_depth"] for one in results]).clamp_min(0).float().cpu().numpy()

    return depth


def _load_metric3d(folder: str, device):
    """Metric3Dv2 giant from a local clone of yvanyin/metric3d: resized into 616x1064, padded with the mean
    colour, cropped back, and scaled from the canonical camera: depth x fx_resized / 1000, clamped to 0..300
    m."""
    place = Path(folder) if folder else Path(torch.hub.get_dir()) / "yvanyin_metric3d_main"
    if not (place / "hubconf.py").is_file():
        remedy = "git clone https://github.com/YvanYin/Metric3D and give --depth-model metric3d:FOLDER"
        raise InputError(f"{place}: no Metric3D here; {remedy}")
    try:
        model = torch.hub.load(str(place), "metric3d_vit_giant2", source="local", pretrain=True)
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"{place}: Metric3D does not load ({reason(error)}); see its README") from error
    model = model.to(device).eval()
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (METRIC3D_MEAN, METRIC3D_STD))

    def depth(images: list[np.ndarray], K: np.ndarray) -> np.ndarray:
        H, W = images[0].shape[:2]
        scale = min(METRIC3D_SIZE[0] / H, METRIC3D_SIZE[1] / W)
        h, w = int(H * scale), int(W * scale)
        top, left = (METRIC3D_SIZE[0] - h) // 2, (METRIC3D_SIZE[1] - w) // 2
        pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float()  # RGB 0..255
        small = F.interpolate(pixels, (h, w), mode="bilinear", align_corners=False)  # (n, 3, h, w) RGB
        padded = torch.zeros(len(images), 3, *METRIC3D_SIZE, device=device)  # 0 = the mean colour
        padded[:, :, top : top + h, left : left + w] = (small - mean) / std
        with torch.inference_mode():
            canonical = model.inference({"input": padded})[0]  # (n, 1, 616, 1064)
        canonical = canonical.reshape(len(images), 1, *METRIC3D_SIZE)[:, :, top : top + h, left : left + w]
        full = F.interpolate(canonical.float(), (H, W), mode="bilinear", align_corners=False)  # (n, 1, H, W)
        focal = torch.as_tensor(K[:, 0, 0] * scale, dtype=torch.float32, device=device)
        return (full[:, 0] * (focal / METRIC3D_FOCAL)[:, None, None]).clamp(0, 300).cpu().numpy()

    return depth


# --- a segmenter and an open vocabulary: semantic maps alone ------------------------------------------------

SEGMENTER = "facebook/mask2former-swin-large-mapillary-vistas-semantic"  # street scenes, 65 classes
SAM2 = "facebook/sam2.1-hiera-large"


class Segmenter:
    """A segmentation network of transformers (Mask2Former, MaskFormer, SegFormer, UperNet, ...) on a
    dataset's classes.

    names   the network's class name, in lower case -> id; a pixel of a class without a name here is `none`
    model   hub id or local folder; None: `SEGMENTER`, from this machine only (nothing unnamed is downloaded)
    Raises InputError if the model cannot be had, or if no class of it has a name.
    """

    def __init__(self, dataset, names: dict[str, int], none: int, model: str | None = None,
                 device: str | None = None):
        self.dataset, self.device, name = dataset, _device(device), model or SEGMENTER
        self.model, self.processor = _load_segmenter(name, not model, self.device)
        known = self.model.config.id2label
        self.table = np.full(max(known) + 1, none, np.uint8)
        for k, label in known.items():
            self.table[k] = names.get(label.replace("_", " ").strip().lower(), none)
        if (self.table == none).all():
            shown = ", ".join(list(known.values())[:4])
            raise InputError(f"--segmenter {name}: none of its classes ({shown}, ...) is in the table of "
                             "shared classes")
        self.note = f"segmentation by {name}"

    def __call__(self, i: int) -> np.ndarray:
        """Frame i -> (N, H, W) uint8 ids, `none` where the network predicts a class that is not shared."""
        maps = []
        for image in _photos(self.dataset, i):
            inputs = self.processor(images=image, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                outputs = self.model(**inputs)
            size = [image.shape[:2]]
            (found,) = self.processor.post_process_semantic_segmentation(outputs, target_sizes=size)
            maps.append(self.table[found.cpu().numpy()])
        return np.stack(maps)


@functools.lru_cache(maxsize=1)
def _load_segmenter(name: str, local_only: bool, device):
    from transformers import (MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, AutoConfig, AutoImageProcessor,
                              AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation)

    (config,) = load_pretrained("--segmenter", name, AutoConfig, local_only=local_only)
    universal = type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
    kind = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
    model, processor = load_pretrained("--segmenter", name, kind, AutoImageProcessor, local_only=local_only)
    if not hasattr(processor, "post_process_semantic_segmentation"):
        raise InputError(f"--segmenter {name}: a {config.model_type} gives no semantic map; use a semantic "
                         "segmenter")
    return model.to(device).eval(), processor


class OpenVocabulary:
    """GroundingDINO boxes of named classes, SAM2 masks of the boxes: one map of these classes alone.

    prompts   id -> phrases; each id is asked for by itself, so a phrase need not be read back from tokens
    Where masks overlap the largest box score wins (`paint`). Elsewhere `none`.
    """

    def __init__(self, dataset, prompts: dict[int, tuple[str, ...]], none: int, grounding: str | None = None,
                 sam: str | None = None, device: str | None = None):
        self.dataset, self.prompts, self.none, device = dataset, prompts, none, _device(device)
        names = grounding or GROUNDING, sam or SAM2
        self.grounding = _load("grounding", names[0], not grounding, device)
        (self.sam,) = _load("sam2", names[1], not sam, device)
        self.note = f"open vocabulary by {names[0]} + {names[1]}"

    def __call__(self, i: int) -> np.ndarray:
        """Frame i -> (N, H, W) uint8 ids."""
        maps = []
        for image in _photos(self.dataset, i):
            boxes, scores, ids = self.detect(image)
            maps.append(paint(sam2_masks(self.sam, image, boxes), scores, ids, image.shape[:2], self.none))
        return np.stack(maps)

    def detect(self, image: np.ndarray) -> tuple[torch.Tensor, list[float], list[int]]:
        """(H, W, 3) uint8 -> boxes (n, 4) xyxy [px], n scores, n ids."""
        boxes, scores, ids = [torch.zeros(0, 4)], [], []
        for label, phrases in self.prompts.items():
            (found,) = find_boxes(*self.grounding, [image], ". ".join(phrases) + ".")
            boxes.append(found["boxes"].cpu())
            scores += found["scores"].tolist()
            ids += [label] * len(found["boxes"])
        return torch.cat(boxes), scores, ids


def sam2_masks(model, image: np.ndarray, boxes: torch.Tensor):
    """SAM2 on an image (H, W, 3) uint8 RGB: yields the mask (H, W) bool of each of the boxes (n, 4) xyxy
    [px].

    Its preprocessing is written out here (transformers' needs torchvision): the image stretched to a square,
    ImageNet's mean and deviation; boxes stretched alike; masks resized bilinearly and cut at logit 0.
    """
    if not len(boxes):
        return
    h, w = image.shape[:2]
    size = model.config.prompt_encoder_config.image_size
    size = size if isinstance(size, int) else size[0]
    pixels = torch.tensor(image, device=model.device).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    stretched = (boxes * boxes.new_tensor([size / w, size / h] * 2)).to(model.device)
    with torch.inference_mode():
        embeddings = model.get_image_embeddings((pixels - mean) / std)
        for part in stretched.split(CHUNK):
            out = model(image_embeddings=embeddings, input_boxes=part[None], multimask_output=False)
            logits = F.interpolate(out.pred_masks[0].float(), (h, w), mode="bilinear", align_corners=False)
            yield from logits[:, 0] > 0


# Dataset's class <- names in the taxonomies of MSeg, Cityscapes, Mapillary Vistas and ADE20K: the classes
# that a segmentation network and the dataset share.
SEGMENTER_WORDS = {
    "occ3d": {
        "driveable_surface": ("road", "lane marking - general", "lane marking - crosswalk",
                              "crosswalk - plain", "bike lane", "service lane", "parking", "pothole",
                              "manhole"),
        "sidewalk": ("sidewalk", "pavement", "pedestrian area", "curb", "curb cut", "sidewalk pavement"),
        "terrain": ("terrain", "grass", "sand", "earth", "mountain", "snow", "field"),
        "vegetation": ("vegetation", "tree", "plant"),
        "manmade": ("building", "wall", "fence", "pole", "traffic light", "traffic sign",
                    "traffic sign (front)", "traffic sign (back)", "traffic sign frame", "utility pole",
                    "street light", "bridge", "tunnel", "billboard", "guard rail", "banner", "fire hydrant",
                    "junction box", "mailbox", "bench", "bike rack"),
        "pedestrian": ("person", "pedestrian"),
        "bicycle": ("bicycle", "bicyclist"),
        "motorcycle": ("motorcycle", "motorcyclist", "minibike"),
        "car": ("car", "van"),
        "truck": ("truck",),
        "bus": ("bus",),
    },
    "semantickitti": {
        "road": ("road", "lane marking - general", "lane marking - crosswalk", "crosswalk - plain",
                 "bike lane", "service lane", "pothole", "manhole"),
        "sidewalk": ("sidewalk", "pavement", "pedestrian area", "curb", "curb cut", "sidewalk pavement"),
        "terrain": ("terrain", "grass", "sand", "earth", "field"),
        "vegetation": ("vegetation", "tree", "plant"),
        "building": ("building", "wall", "bridge", "tunnel"),
        "fence": ("fence", "guard rail"),
        "pole": ("pole", "utility pole", "street light"),
        "traffic-sign": ("traffic sign", "traffic sign (front)"),
        "person": ("person", "pedestrian"),
        "bicycle": ("bicycle",),
        "motorcycle": ("motorcycle", "minibike"),
        "car": ("car",),
        "truck": ("truck",),
    },
}  # fmt: skip


class TwoSources:
    """Two 2D sources of a frame, for a method that merges them: a segmenter's map of the classes that it
    shares with the dataset, and a map of `unaligned` classes alone, which it lacks.

    labels     common.datasets.LabelSet
    unaligned  class -> prompts of the open vocabulary, and the class that a *synthetic* first source takes it
               for (or None)
    Called with a dataset index -> two maps (N, h, w) uint8 dataset ids, `labels.none` where unknown. Of each
    map every `stride`-th pixel is kept; a raster of LiDAR points (labeler lidar: an upper bound) is kept
    whole. Raises InputError as the labelers do.
    """

    def __init__(self, name: str, dataset, labels, unaligned: dict[str, tuple[tuple[str, ...], str | None]],
                 *, stride: int = 2, primary_level: str = "mild", auxiliary_level: str = "mild",
                 correlation: float = 0.8, seed: int = 0, segmenter: str | None = None,
                 grounding: str | None = None, sam: str | None = None, maps: str | None = None,
                 auxiliary_maps: str | None = None):
        self.dataset, self.labels, self.stride = dataset, labels, 1 if name == "lidar" else stride
        self.unaligned = [labels.of_name(c) for c in unaligned]
        if name == "world":
            options = {"depth_level": "exact", "correlation": correlation}
            first = make_labeler("world", dataset, semantic_level=primary_level, seed=seed, **options)
            second = make_labeler("world", dataset, semantic_level=auxiliary_level, seed=seed + 1, **options)
            seen_as = np.arange(256, dtype=np.uint8)  # the first source does not know the un-aligned classes
            for c, (_, taken_for) in unaligned.items():
                seen_as[labels.of_name(c)] = labels.of_name(taken_for) if taken_for else labels.none
            self.sources = (lambda i: seen_as[first(i).semantic], lambda i: second(i).semantic)
            self.note = f"synthetic maps, {primary_level} first, {auxiliary_level} second source"
            if {primary_level, auxiliary_level} != {"exact"}:
                self.note += f", error correlation {correlation:g}"
            self.note += f", seed {seed}"
        elif name == "foundation":
            kind = "occ3d" if labels.none == FREE else "semantickitti"
            words = {word: labels.of_name(c) for c, many in SEGMENTER_WORDS[kind].items() for word in many}
            prompts = {labels.of_name(c): phrases for c, (phrases, _) in unaligned.items()}
            second = OpenVocabulary(dataset, prompts, labels.none, grounding, sam)
            self.sources = Segmenter(dataset, words, labels.none, segmenter), second
            self.note = "; ".join(source.note for source in self.sources)
        elif name == "files":
            if maps is None:
                raise InputError("labeler files: which folder? give --maps FOLDER (format: "
                                 "common/labelers.py)")
            folders = {"--maps": maps, "--auxiliary-maps": auxiliary_maps}
            for flag, folder in folders.items():
                if folder is not None and not (Path(folder) / "semantic").is_dir():
                    raise InputError(f"{flag} {folder}: no folder semantic/ in it")
            self.sources = tuple(functools.partial(self._read, f) if f else None for f in folders.values())
            self.note = "2D maps read from " + " and ".join(folder for folder in folders.values() if folder)
        elif name == "lidar":
            if dataset.lidarseg(0) is None:
                raise InputError(f"{dataset.root}: no point labels of its scans; use --labeler foundation or "
                                 "files")
            self.sources = (self._raster, None)
            self.note = ("annotated LiDAR points, projected (not label-efficient: uses annotations of each "
                         "frame)")
        else:
            raise InputError(f"labeler '{name}': one of world, foundation, lidar, files")

    def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame i: the first source's map, the second's of the un-aligned classes alone."""
        first = self.sources[0](i)
        second = self.sources[1](i) if self.sources[1] else np.full_like(first, self.labels.none)
        if second.shape != first.shape:
            path = map_paths(self.sources[1].args[0], "semantic", self.dataset.camera_files(i))[0]
            raise InputError(f"{path}: {second.shape[1:]} px, --maps has {first.shape[1:]}")
        second = np.where(np.isin(second, self.unaligned), second, np.uint8(self.labels.none))
        kept = slice(self.stride // 2, None, self.stride)
        return tuple(np.ascontiguousarray(m[:, kept, kept]) for m in (first, second))

    def _read(self, folder: str, i: int) -> np.ndarray:
        files = self.dataset.camera_files(i)
        return read_semantic(folder, files, self.labels.map_ids(), self.labels.none)

    def _raster(self, i: int) -> np.ndarray:
        points, ids = self.dataset.points(i), self.dataset.lidarseg(i)
        known = np.isin(ids, self.labels.ids[:-1])
        K, T_ego_cam, _ = self.dataset.calibration(i)
        h, w = self.dataset.image_size
        return rasterize(points[known, :3], ids[known], K, T_ego_cam, h, w, self.labels.none)[0]


class PromptedMasks:
    """GroundingDINO + SAM: masks of the objects that a robot's instruction and a general prompt name.

    Called with an observation (common.observation) -> masks (H, W) bool of each view. Of two boxes on one
    object the first stays. Raises InputError if a model cannot be had.
    """

    def __init__(self, grounding: str | None = None, sam: str | None = None, device: str | None = None):
        device = _device(device)
        self.grounding = _load("grounding", grounding or GROUNDING, not grounding, device)
        self.sam = _load("sam", sam or SAM, not sam, device)

    def __call__(self, observation) -> list[list[np.ndarray]]:
        """Masks of each view."""
        instruction = observation.instruction.lower().strip(".")
        prompt = f"object. bowl. plate. box. can. bottle. mug. drawer. {instruction}."
        views = []
        for image in observation.images:
            boxes = find_boxes(*self.grounding, [image], prompt, threshold=0.25)[0]["boxes"].cpu()
            kept: list[np.ndarray] = []
            for mask in sam_masks(*self.sam, image, boxes):
                mask = mask.cpu().numpy()
                if mask.any() and all((mask & k).sum() < 0.7 * min(mask.sum(), k.sum()) for k in kept):
                    kept.append(mask)
            views.append(kept)
        return views
