"""common/labelers.py: the maps format, the classes of `lidar`, `foundation` on tiny models."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from common import labelers
from common.files import InputError
from common.labelers import (PHRASES, PROMPTS, Maps, PromptedMasks, box_labels, fit_ground, make_labeler, map_paths,
                             paint, phrase_ids, rasterize, sam_masks, write_maps, write_semantic)
from common.nuscenes import DETECTION_CLASSES, FREE, NuScenesOccupancy
from fake_world import FakeLidar, FakeWorld, save_grounding_dino


def same(a: Maps, b: Maps) -> bool:
    return np.array_equal(a.semantic, b.semantic) and np.array_equal(a.depth, b.depth)


# --- the maps format and `files` ----------------------------------------------------------------------------


def test_written_maps_are_read_back_within_half_a_count(tmp_path):
    data = FakeWorld(tmp_path)
    semantic, depth, _ = data.exact(0)
    depth[0, 0, :4] = np.nan, -1, 300, 1.23456
    write_maps(tmp_path / "m", data.camera_files(0), Maps(semantic, depth))
    maps = make_labeler("files", data, maps=tmp_path / "m")(0)
    assert maps.semantic.dtype == np.uint8 and maps.depth.dtype == np.float32
    assert np.array_equal(maps.semantic, semantic)
    assert maps.depth[0, 0].tolist()[:3] == [0, 0, 65535 / 256]
    assert abs(maps.depth[0, 0, 3] - 1.23456) <= 0.5 / 256
    known = (depth > 0) & (depth < 250)
    assert np.abs(maps.depth - depth)[known].max() <= 0.5 / 256 + 1e-5
    assert sorted(p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*.png"))[:2] == [
        "depth/CAM_BACK/000000__CAM_BACK.png", "depth/CAM_BACK_LEFT/000000__CAM_BACK_LEFT.png"]  # fmt: skip


def png(values) -> bytes:
    """The bytes that write_semantic puts into a file."""
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("semantic", None, "not found"),
        ("depth", b"", "the file is empty"),
        ("depth", png(np.ones((40, 72), np.uint16))[:60], "not a readable map"),
        ("depth", png(np.ones((40, 72), np.uint8)), "expected 16 bits"),
        ("semantic", png(np.ones((40, 72), np.uint16)), "expected 8 bits"),
        ("semantic", png(np.ones((40, 72, 3), np.uint8)), "expected 8 bits and one channel"),
        ("semantic", png(np.full((40, 72), 18, np.uint8)), "id 18"),
        ("semantic", png(np.ones((40, 71), np.uint8)), "71x40"),
        ("depth", png(np.ones((20, 36), np.uint16)), "36x20"),
    ],
)
def test_a_bad_map_file_is_named(tmp_path, kind, content, message):
    data = FakeWorld(tmp_path)
    shape = (6, 40, 72)
    write_maps(tmp_path, data.camera_files(0), Maps(np.zeros(shape, np.uint8), np.ones(shape, np.float32)))
    bad = map_paths(tmp_path, kind, data.camera_files(0))[3]
    bad.unlink()
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(InputError) as error:
        make_labeler("files", data, maps=tmp_path)(0)
    assert str(bad) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_maps_may_have_another_resolution_but_not_another_shape_than_the_image(tmp_path):
    data = FakeWorld(tmp_path, shape=(90, 160))
    for width in (80, 45):
        shape = (6, 45, width)
        write_maps(tmp_path, data.camera_files(0), Maps(np.zeros(shape, np.uint8), np.ones(shape, np.float32)))
        if width == 80:
            assert make_labeler("files", data, maps=tmp_path)(0).depth.shape == shape
    with pytest.raises(InputError, match="45x45 px has another shape than the 160x90 image"):
        make_labeler("files", data, maps=tmp_path)(0)


def test_semantic_and_depth_may_differ_in_size_and_depth_may_be_absent(tmp_path):
    data, files = FakeWorld(tmp_path, shape=(90, 160)), FakeWorld(tmp_path, shape=(90, 160)).camera_files(0)
    semantic = np.random.default_rng(0).integers(0, 18, (6, 90, 160)).astype(np.uint8)
    write_semantic(tmp_path, files, semantic)
    with pytest.raises(InputError, match="needs semantic/ and depth/"):
        make_labeler("files", data, maps=tmp_path)
    maps = make_labeler("files", data, maps=tmp_path, depth=False)(0)
    assert np.array_equal(maps.semantic, semantic) and not maps.depth.any()
    for (h, w), own in (((30, 53), None), ((45, 80), semantic[:, 1::2, 1::2]), ((180, 320), semantic.repeat(2, 1).repeat(2, 2))):
        write_semantic(tmp_path, files, np.full((6, h, w), 512, np.uint16), "depth")
        maps = make_labeler("files", data, maps=tmp_path)(0)
        assert maps.semantic.shape == maps.depth.shape == (6, h, w) and (maps.depth == 2).all()
        assert own is None or np.array_equal(maps.semantic, own)


def test_make_labeler_refuses_what_it_does_not_know(tmp_path):
    for name, options, message in (
        ("oracle", {}, "one of world, foundation, lidar, files"),
        ("files", {}, "--maps"),
        ("files", {"maps": tmp_path / "none"}, "no such folder"),
        ("world", {}, r"no exact maps in .*: run labels with --labeler foundation\|lidar\|files"),
    ):
        with pytest.raises(InputError, match=message):
            make_labeler(name, FakeWorld(tmp_path), **options)


# --- lidar --------------------------------------------------------------------------------------------------


def test_lidar_without_lidarseg_takes_boxes_then_a_ground_plane(tmp_path):
    data = FakeLidar(tmp_path)
    labeler = make_labeler("lidar", data, seen_only=False)
    maps = labeler(0)
    assert "boxes" in labeler.note and "0.3 m" in labeler.note
    # the ego's own returns are gone: its 100, and the ground under the car
    x, y = data.parts["ground"][:, 0], data.parts["ground"][:, 1]
    under = (x > -0.9) & (x < 3.6) & (np.abs(y) < 1)
    assert len(maps.points) == 6750 - under.sum()
    names = np.repeat(np.arange(4), [6000 - under.sum(), 500, 200, 50])
    ground, kerb, car, bicycle = (np.bincount(maps.labels[names == k], minlength=18) for k in range(4))
    assert ground[11] >= 0.98 * ground.sum()  # some lie in the boxes
    assert kerb[0] == 500  # more than 0.3 m above the tilted plane: others
    assert bicycle[2] == 50 and bicycle[4] == 0  # the smallest box that holds a point
    inside_bicycle = np.abs(data.parts["car"] - [10, 3.6, 0.9]) <= np.array([1.7, 0.6, 1.3]) / 2
    assert car[2] == inside_bicycle.all(1).sum() and car[2] + car[4] == 200


def test_lidar_with_lidarseg_takes_it_and_drops_noise_and_ego(tmp_path):
    data = FakeLidar(tmp_path, lidarseg=True)
    labeler = make_labeler("lidar", data, seen_only=False)
    maps = labeler(0)
    assert labeler.note == "LiDAR points, classes from lidarseg"
    count = np.bincount(maps.labels, minlength=18)
    assert count[15] == 500 and count[4] == 200 and count[2] == 50 and count.sum() == count[[2, 4, 11, 15]].sum()
    under = (np.abs(data.parts["ground"][10:, :2] - [1.35, 0]) < [2.25, 1.0]).all(1)
    assert count[11] == 5990 - under.sum()


def test_lidar_maps_hold_the_nearest_point_of_each_pixel(tmp_path):
    data = FakeLidar(tmp_path)
    everything, maps = (make_labeler("lidar", data, seen_only=flag)(0) for flag in (False, True))
    K, T, _ = data.calibration(0)
    seen = np.zeros(len(everything.points), bool)
    for n in range(6):
        nearest = {}
        local = (everything.points - T[n, :3, 3]) @ T[n, :3, :3]
        for m, (p, label) in enumerate(zip(local.astype(float), everything.labels, strict=True)):
            if p[2] <= 1:
                continue
            u, v = (K[n] @ p)[:2] / p[2]
            if 0 <= u < 320 and 0 <= v < 180:
                seen[m] = True
                key = int(v), int(u)
                if key not in nearest or p[2] < nearest[key][0]:
                    nearest[key] = p[2], label
        assert np.count_nonzero(maps.depth[n]) == len(nearest) > 50
        for (v, u), (z, label) in nearest.items():
            assert maps.depth[n, v, u] == pytest.approx(z, abs=1e-4) and maps.semantic[n, v, u] == label
        assert (maps.semantic[n][maps.depth[n] == 0] == FREE).all()
    assert np.array_equal(maps.points, everything.points[seen]) and np.array_equal(maps.labels, everything.labels[seen])
    assert make_labeler("lidar", data, scale=0.5)(0).depth.shape == (6, 90, 160)


def test_ground_plane_is_found_among_outliers_and_refused_where_there_is_none():
    rng = np.random.default_rng(1)
    xy = rng.uniform(-20, 20, (3000, 2))
    z = xy @ [0.03, -0.02] + 0.2 + rng.normal(0, 0.02, 3000)
    z[:1200] = rng.uniform(-1, 1, 1200)
    plane = fit_ground(np.column_stack([xy, z]), seed=0)
    assert plane == pytest.approx((0.03, -0.02, 0.2), abs=0.01)
    assert plane == fit_ground(np.column_stack([xy, z]), seed=0)
    assert fit_ground(np.zeros((0, 3)), 0) == fit_ground(rng.uniform(-1, 1, (50, 3)), 0) == (0, 0, 0)
    wall = np.column_stack([rng.uniform(-20, 20, 500), np.full(500, 5.0), rng.uniform(-0.9, 0.9, 500)])
    assert fit_ground(wall, 0) == (0, 0, 0)  # collinear in x, y: no plane over the ground


def test_box_labels_turn_with_the_box():
    T = np.eye(4)[None].copy()
    T[0, :2, :2], T[0, :3, 3] = [[0, -1], [1, 0]], [5, 5, 0]  # heading along ego y
    points = np.array([[5, 6.9, 0], [6.9, 5, 0], [5.4, 5, 0], [5, 5, 0.6]])
    assert box_labels(points, T, np.array([[1.0, 4.0, 1.0]]), np.array([10])).tolist() == [10, FREE, 10, FREE]


def test_rasterize_of_a_pixel_centre_is_exact():
    K, T, _ = FakeWorld(".", shape=(40, 72)).calibration(0)
    depth = np.full((6, 40, 72), 7.0)
    u, v = np.meshgrid(np.arange(72) + 0.5, np.arange(40) + 0.5)
    ray = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K[1].astype(float)).T
    points = (ray * depth[1][..., None]).reshape(-1, 3) @ T[1, :3, :3].T + T[1, :3, 3]
    semantic, made, seen = rasterize(points, np.full(len(points), 4), K[1:2], T[1:2], 40, 72)
    assert seen.all() and (semantic == 4).all() and np.allclose(made, 7, atol=1e-5)


def test_real_keyframe_boxes_hold_the_points_that_nuscenes_counted(tmp_path):
    root = Path(__file__).parents[2] / "shared" / "real" / "nuscenes"
    if not root.is_dir():
        pytest.skip(f"{root} is not here: no real keyframe")
    real = NuScenesOccupancy(root, split="all", cache=tmp_path, parts=())
    points, boxes, one = real.points(0)[:, :3], real.boxes(0), np.array([1], np.uint8)
    for b in range(len(boxes.labels)):
        inside = box_labels(points, boxes.T_ego_box[b : b + 1], boxes.size[b : b + 1], one) == 1
        assert inside.sum() == boxes.num_lidar_pts[b], boxes.names[b]


# --- foundation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random GroundingDINO, SAM and Depth Anything, saved as from_pretrained reads them."""
    import transformers as t
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    torch.set_num_threads(1)

    save_grounding_dino(root, {word.strip(",.") for prompt in PROMPTS for word in prompt.split()})
    sam = t.SamConfig(
        vision_config=t.SamVisionConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, output_channels=16,
            global_attn_indexes=[1], window_size=4, mlp_dim=16, num_pos_feats=8).to_dict(),
        prompt_encoder_config=t.SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4).to_dict(),
        mask_decoder_config=t.SamMaskDecoderConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=16, iou_head_hidden_dim=16).to_dict(),
    )  # fmt: skip
    t.SamModel(sam).save_pretrained(root / "sam")
    processor = SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16})  # fmt: skip
    t.SamProcessor(processor).save_pretrained(root / "sam")

    dino2 = t.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=1, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)  # fmt: skip
    resize = DPTImageProcessorPil(size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14)
    for kind in ("metric", "relative"):
        anything = t.DepthAnythingForDepthEstimation(t.DepthAnythingConfig(
            backbone_config=dino2, reassemble_hidden_size=16, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
            head_hidden_size=8, depth_estimation_type=kind, max_depth=80))  # fmt: skip
        for weight in anything.head.parameters():
            torch.nn.init.normal_(weight)
        anything.save_pretrained(root / kind)
        resize.save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two keyframes of coloured noise, 128x224 px."""
    data = FakeWorld(tmp_path_factory.mktemp("photos"), shape=(128, 224))
    rng = np.random.default_rng(0)
    for i in range(2):
        for name in data.camera_files(i):
            (data.root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 28, 3), dtype=np.uint8)).resize((224, 128)).save(data.root / name)
    return data


def options(models, **changes) -> dict:
    folders = {"grounding": str(models / "dino"), "sam": str(models / "sam"), "depth": str(models / "metric")}
    return folders | {"device": "cpu"} | changes


def test_foundation_runs_saved_models_and_reads_its_cache(models, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(labelers, "BATCH", 4)
    labeler = make_labeler("foundation", photos, **options(models, cache_maps=tmp_path))
    maps = labeler(0)
    assert maps.semantic.shape == maps.depth.shape == (6, 128, 224)
    assert maps.semantic.dtype == np.uint8 and maps.semantic.max() <= FREE and maps.depth.dtype == np.float32
    assert (maps.semantic < FREE).any() and 0 < maps.depth.max() <= 80 and maps.depth.std() > 0.01
    assert all(str(models / name) in labeler.note for name in ("dino", "sam", "metric"))
    settings = json.loads((tmp_path / "maps.json").read_text())
    assert settings["box_threshold"] == settings["text_threshold"] == 0.2 and len(settings["prompts"]) == 7
    # the cache is the maps format, gives the same maps, and is not computed again
    assert same(maps, make_labeler("files", photos, maps=tmp_path)(0))
    again = make_labeler("foundation", photos, **options(models, cache_maps=tmp_path))
    assert again.sam[0] is labeler.sam[0] and again.depth_of is labeler.depth_of  # one copy of the models in memory
    again.detect = None
    assert same(again(0), maps)
    with pytest.raises(InputError, match="no such folder"):  # a model that does not load claims no cache
        make_labeler("foundation", photos, **options(models, cache_maps=tmp_path / "new", depth="./nowhere"))
    assert not (tmp_path / "new").exists()
    # one image at a time gives what a batch gives
    monkeypatch.setattr(labelers, "BATCH", 1)
    alone = make_labeler("foundation", photos, **options(models))(0)
    assert (alone.semantic == maps.semantic).mean() > 0.999 and np.abs(alone.depth - maps.depth).max() <= 2 / 256
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: torch sees no CUDA"):
            make_labeler("foundation", photos, **options(models, device="cuda"))
    with pytest.raises(InputError, match="made with another depth"):
        make_labeler("foundation", photos, **options(models, cache_maps=tmp_path, depth="metric3d"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_foundation_on_a_gpu_gives_what_the_cpu_gives(models, photos):
    cpu, gpu = (make_labeler("foundation", photos, **options(models, device=device))(0) for device in ("cpu", "cuda"))
    assert (cpu.semantic == gpu.semantic).mean() > 0.99 and np.abs(cpu.depth - gpu.depth).max() < 0.05


def test_foundation_names_a_missing_or_wrong_model(models, photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for changes, message in (
        ({"grounding": None}, "IDEA-Research/grounding-dino-base: not on this machine; --grounding takes a local"),
        ({"grounding": str(tmp_path / "nowhere")}, "--grounding .*no such folder"),
        ({"grounding": str(models / "sam")}, "a model of type 'sam', expected 'grounding-dino'"),
        ({"sam": "nobody/no-such-model"}, "--sam nobody/no-such-model: not in the local cache"),
        ({"depth": str(models / "sam")}, "--depth-model .*cannot be loaded"),
        ({"depth": str(models / "relative")}, "relative depth; metres need a metric model"),
        ({"depth": f"metric3d:{tmp_path}"}, "no Metric3D here"),
        ({"cache_maps": tmp_path / "full"}, "not empty and without maps.json"),
    ):
        with pytest.raises(InputError, match=message) as error:
            make_labeler("foundation", photos, **options(models, **changes))
        assert "\n" not in str(error.value)


def test_detections_are_thresholded_and_named_by_their_tokens(models, photos):
    """Hand-made logits for the prompt "bicycle, bicyclist." through the real post-processing."""
    labeler = make_labeler("foundation", photos, **options(models))
    tokenizer = labeler.grounding[1].tokenizer
    target = PROMPTS.index("bicycle, bicyclist.")
    calls = []

    def grounding(input_ids, pixel_values, **_):
        logits = torch.full((len(pixel_values), 5, 64), -10.0)
        if tokenizer.decode(input_ids[0]) == tokenizer.decode(tokenizer(PROMPTS[target]).input_ids):
            place = {tokenizer.convert_ids_to_tokens(int(k)): j for j, k in enumerate(input_ids[0])}
            p = lambda probability: float(np.log(probability / (1 - probability)))  # noqa: E731
            logits[0, 0, place["bicycle"]] = p(0.6)
            logits[0, 1, [place["bicycle"], place["bicyclist"]]] = p(0.5)  # "bicycle bicyclist" is no phrase
            logits[0, 2, place["bicyclist"]] = p(0.21)
            logits[0, 3, place["bicycle"]] = p(0.19)  # below the box threshold
            logits[0, 4, [place["bicycle"], place["."]]] = p(0.4)  # the full stop is not part of a phrase
        calls.append(len(pixel_values))
        boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(len(pixel_values), 5, 4)
        return SimpleNamespace(logits=logits, pred_boxes=boxes)

    grounding.device = "cpu"
    labeler.grounding = grounding, labeler.grounding[1]
    (boxes, scores, ids), (nothing, *_) = labeler.detect([np.zeros((128, 224, 3), np.uint8)] * 2)
    assert calls == [2] * len(PROMPTS)
    assert ids == [2, 2, 2] and scores == pytest.approx([0.6, 0.21, 0.4], abs=1e-5)
    assert boxes[0].tolist() == pytest.approx([0.4 * 224, 0.3 * 128, 0.6 * 224, 0.7 * 128], abs=1e-3)
    assert nothing.shape == (0, 4)


def test_a_pixel_takes_the_phrase_of_the_largest_mask_times_score():
    masks = torch.tensor([[[1, 1, 1, 0]] * 2, [[0, 1, 1, 0]] * 2, [[0, 0, 1, 0]] * 2]).bool()
    label = paint(masks, [0.3, 0.5, 0.5], [4, 7, 2], (2, 4), FREE)
    assert label.dtype == np.uint8 and label.tolist() == [[4, 7, 7, FREE]] * 2  # of equal scores the first, as argmax
    weights = torch.cat([torch.zeros(1, 2, 4), masks * torch.tensor([0.3, 0.5, 0.5])[:, None, None]])
    assert (torch.tensor([FREE, 4, 7, 2])[weights.argmax(0)].numpy() == label).all()  # OccNeRF's formula


class HandMadeSam:
    """Box k starts at x = k in SAM's own pixels; it gets the k-th of three masks."""

    device = "cpu"

    def __init__(self):
        self.low = torch.full((1, 3, 1, 16, 16), -1.0)  # 128x224 px fill 37x64 of 64x64: 16 columns, 9.25 rows
        self.low[0, 0, 0, :, :8], self.low[0, 1, 0, :5], self.low[0, 2] = 1, 1, 1

    def get_image_embeddings(self, pixel_values):
        return pixel_values

    def __call__(self, image_embeddings, input_boxes, multimask_output):
        first = round(input_boxes[0, 0, 0].item())
        return SimpleNamespace(pred_masks=self.low[:, first : first + input_boxes.shape[1]])


def test_sams_masks_come_in_chunks_through_the_real_resizing(models, photos, monkeypatch):
    """The left half of the image is the first box's."""
    processor = make_labeler("foundation", photos, **options(models)).sam[1]
    boxes = torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 2, 1], [2.0, 0, 3, 1]]) * (224 / 64)
    image = np.zeros((128, 224, 3), np.uint8)
    monkeypatch.setattr(labelers, "CHUNK", 2)
    masks = list(sam_masks(HandMadeSam(), processor, image, boxes))
    got = paint(masks, [0.5, 0.9, 0.3], [11, 16, 15], image.shape[:2], FREE)
    assert got.shape == (128, 224) and set(np.unique(got).tolist()) == {11, 15, 16}
    assert got[10, 10] == got[10, 200] == 16 and got[110, 10] == 11 and got[110, 200] == 15
    assert not list(sam_masks(None, None, image, boxes[:0]))


def test_of_two_boxes_on_one_object_a_robots_masks_keep_the_first(monkeypatch):
    """The second view has no boxes, and no masks."""
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[0, 2:10, 2:10], masks[1, 2:10, 2:11], masks[2, 12:18, 12:18] = True, True, True
    monkeypatch.setattr(labelers, "_load", lambda *_: ("model", "processor"))
    asked = []

    def boxes(model, processor, images, text, threshold):
        asked.append((text, threshold))
        return [{"boxes": torch.zeros(3 if image.max() else 0, 4)} for image in images]

    monkeypatch.setattr(labelers, "find_boxes", boxes)
    monkeypatch.setattr(labelers, "sam_masks", lambda model, processor, image, boxes: iter(masks[: len(boxes)]))
    images = np.stack([np.full((20, 20, 3), 9, np.uint8), np.zeros((20, 20, 3), np.uint8)])
    views = PromptedMasks()(SimpleNamespace(images=images, instruction="Push the cart."))
    assert [[int(mask.sum()) for mask in view] for view in views] == [[64, 36], []]
    assert asked[0] == ("object. bowl. plate. box. can. bottle. mug. drawer. push the cart.", 0.25)


def test_the_dictionary_is_occnerfs():
    assert phrase_ids(["Sedan", "tree.", " highway ", "sedan highway", "", "cat"]) == [4, 16, 11, None, None, None]
    words = {word.strip(",.") for prompt in PROMPTS for word in prompt.split()}
    assert words | {"person"} == set(PHRASES)  # each prompted word has a class, and no class lacks a prompt
    assert set(PHRASES.values()) == set(range(1, 12)) | {13, 14, 15, 16, FREE}  # no others, no other_flat
    assert [DETECTION_CLASSES[PHRASES[word] - 1] for word in ("sedan", "crane", "cone")] == [
        "car", "construction_vehicle", "traffic_cone"]  # fmt: skip


def test_metric3d_is_padded_cropped_and_scaled_by_the_focal_length(photos, tmp_path):
    """A stand-in that answers with its red input channel: the recipe around it must give that channel,
    scaled."""
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "class Red(torch.nn.Module):\n"
        "    def inference(self, data):\n"
        "        x = data['input']\n"
        "        assert x.shape[1:] == (3, 616, 1064), x.shape\n"
        "        assert (x[:, :, 0] == 0).all() or (x[:, :, :, 0] == 0).all()\n"
        "        return (x[:, :1] * 58.395 + 123.675), None, {}\n"
        "def metric3d_vit_giant2(pretrain=False):\n"
        "    assert pretrain\n"
        "    return Red()\n"
    )
    depth_of = labelers.load_depth(f"metric3d:{tmp_path}", False, torch.device("cpu"))
    image = np.zeros((90, 160, 3), np.uint8)
    image[..., 0], image[..., 2] = 50, 200  # RGB: were it read as BGR, 200 would come back
    image[:, 80:, 0] = 100
    K = np.array([[[126.0, 0, 80], [0, 126, 45], [0, 0, 1]], [[252.0, 0, 80], [0, 252, 45], [0, 0, 1]]])
    depth = depth_of([image, image], K)
    scale = min(616 / 90, 1064 / 160)  # 6.65: as wide as the network's input, padded above and below
    assert depth.shape == (2, 90, 160)
    for n, focal in enumerate((126, 252)):
        assert depth[n, :, :79] == pytest.approx(np.full((90, 79), 50 * focal * scale / 1000), rel=1e-4)
        assert depth[n, :, 81:] == pytest.approx(np.full((90, 79), 100 * focal * scale / 1000), rel=1e-4)
    image[..., 0] = 255
    assert depth_of([image], K[1:] * [[10], [10], [1]]).max() == 300  # clamped
