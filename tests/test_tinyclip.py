"""The tiny CLIP: what its captions say and never say, what its patches read, how it is loaded; and files of words."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.networks import tinyclip as C
from common.nuscenes import OCC3D_CLASSES
from data import tinyclip as T
from data.driving import objects


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny CLIP of two steps and its crops."""
    out = tmp_path_factory.mktemp("clip") / "a"
    T.make_tinyclip(out, hidden=("trailer", "traffic_cone"), crops=40, steps=2)
    return out


# --- files of words ---------------------------------------------------------------------------------------------------


def test_the_projects_own_lists_are_whole():
    vocabulary = C.read_words(T.OPENSET / "vocabulary.txt")
    assert list(vocabulary) == list(OCC3D_CLASSES[:-1])
    lists = [C.read_words(T.OPENSET / name) for name in ("rare.txt", "street.txt")]
    assert not set(lists[0]) & set(lists[1])
    for words in lists:
        for name, (description, *_) in words.items():
            own = {w.lower() for text in vocabulary[name] for w in text.split()} - {"delivery"}
            assert not own & set(description.split()) - {"vehicle"}, f"{name} is described by its own name"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("car: car\ncar: sedan\n", "'car' a second time"),
        ("car: car\ntruck: truck, car\n", "the prompt 'car' is already there for 'car'"),
        ("car: car, Car\n", "the prompt 'Car' is already there"),
        ("car:\n", "'car' has an empty prompt"),
        ("car: sedan, , suv\n", "'car' has an empty prompt"),
        ("tram: tram\n", "'tram' is not an Occ3D class"),
        ("free: air\n", "'free' is not an Occ3D class"),
        ("# nothing\n\n", "no line 'class: word'"),
    ],
)
def test_bad_prompt_files_cost_one_line(tmp_path, text, complaint):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        C.read_words(path)
    assert complaint in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="file not found"):
        C.read_words(tmp_path / "none.txt")


# --- captions ---------------------------------------------------------------------------------------------------------


def test_a_hidden_kind_is_never_named_and_the_others_are():
    vocabulary, rng = C.read_words(T.OPENSET / "vocabulary.txt"), np.random.default_rng(0)
    facts = [{"kind": kind, "colour": "red", "words": ["small", "with wheels"]} for kind in T.things()]
    hidden = ("trailer", "traffic_cone", "bus")
    said = {f["kind"]: " ".join(T.caption(f, hidden, vocabulary, rng).lower() for _ in range(60)) for f in facts}
    for kind in ("vehicle.trailer", "vehicle.bus.rigid", "vehicle.bus.bendy", "movable_object.trafficcone"):
        assert not any(word in said[kind] for word in ("trailer", "cone", "bus", "traffic"))
        assert ("vehicle" if kind.startswith("vehicle") else "object") in said[kind] and "red" in said[kind]
    assert "truck" in said["vehicle.truck"] and "sedan" in said["vehicle.car"] + "sedan"
    assert "animal" in said["animal"] and "debris" in said["movable_object.debris"]


def test_shape_and_size_come_from_the_parts():
    rng = np.random.default_rng(0)
    assert "pointed" in T.shape_words(objects.cone(rng))
    assert "with two wheels" in T.shape_words(objects.bicycle(rng, False))
    assert "with a rider" in T.shape_words(objects.motorcycle(rng, True))
    assert "with many windows" in T.shape_words(objects.bus(rng))
    assert any("with an arm" in T.shape_words(objects.construction(rng)) for _ in range(4))
    assert "without windows" in T.shape_words(objects.trailer(rng))
    assert T.size_words((9.0, 2.5, 3.2)) == ["large", "tall", "long"]
    assert T.size_words((1.7, 0.5, 1.0)) == ["small", "low", "thin"]
    assert T.size_words((4.5, 1.8, 1.5)) == ["medium"]


@pytest.mark.parametrize(
    "rgb, word",
    [((0.1, 0.1, 0.1), "black"), ((0.9, 0.9, 0.9), "white"), ((0.4, 0.4, 0.42), "grey"), ((0.8, 0.1, 0.1), "red"),
     ((0.9, 0.45, 0.05), "orange"), ((0.9, 0.8, 0.1), "yellow"), ((0.1, 0.6, 0.2), "green"), ((0.1, 0.2, 0.7), "blue"),
     ((0.3, 0.22, 0.15), "brown")],
)  # fmt: skip
def test_colours(rgb, word):
    assert T.colour_word(np.array(rgb)) == word


# --- the model --------------------------------------------------------------------------------------------------------


def test_made_once_with_these_settings_only(made, capsys):
    told = json.loads((made / "tinyclip.json").read_text())
    assert told["hidden"] == ["traffic_cone", "trailer"] and 20 <= told["images"] <= 40
    before = (made / "model.safetensors").stat().st_mtime_ns
    T.make_tinyclip(made, hidden=("traffic_cone", "trailer"), crops=40, steps=2)
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another hidden, steps"):
        T.make_tinyclip(made, hidden=("bus",), crops=40, steps=3)


def test_the_same_crops_give_the_same_weights(made):
    images = np.load(next(made.parent.glob("*.npz")))["images"]
    facts = json.loads(next(made.parent.glob("*crops*.json")).read_text())
    assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3) and len(facts) == len(images)
    assert {"kind", "colour", "words"} == set(facts[0])
    a, b = (T.train(images, facts, (), 3, 2, batch=8) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters()))
    assert a[2] == b[2]


def test_loading_and_its_complaints(made, tmp_path):
    clip = C.load(made)
    assert (clip.size, clip.patch, clip.dim) == (32, 8, 64)
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert C.unknown_words(clip, "a small zebra with wheels") == ["zebra"]
    for words in (["car"], ["pedestrian", "person"]):
        assert torch.allclose(C.ensemble(clip, words).norm(), torch.tensor(1.0), atol=1e-5)
    with pytest.raises(InputError, match="no such folder"):
        C.load("./nowhere")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="a model of type 'bert'"):
        C.load(tmp_path / "x")


def test_ensemble_is_the_normalised_mean_of_normalised_prompts(made):
    clip = C.load(made)
    slow = [C.encode_text(clip, [t.format(w)])[0] for w in ("car", "sedan") for t in C.TEMPLATES]
    assert len(C.TEMPLATES) == 14 and torch.allclose(slow[0].norm(), torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(C.ensemble(clip, ["car", "sedan"]), F.normalize(torch.stack(slow).mean(0), dim=0), atol=1e-5)


def test_patches_are_read_tile_by_tile(made):
    clip = C.load(made)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    features = C.patch_features(clip, image)
    assert features.shape == (1, 8, 12, 64) and torch.allclose(features.norm(dim=-1), torch.ones(1, 8, 12), atol=1e-5)
    tile = C.read_both(clip.model, C.normalise(image[:, :, 32:64, 64:96]))[1].view(4, 4, 64)
    assert torch.allclose(features[0, 4:8, 8:12], tile, atol=1e-5)
    assert C.patch_features(clip, torch.rand(2, 3, 50, 90)).shape == (2, 8, 12, 64)  # resized to whole tiles


def test_in_the_last_layer_a_patch_attends_to_itself_alone():
    """MaskCLIP's reading: with one layer, another patch's pixels cannot change a patch's feature; the class token's do."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    model = CLIPModel(CLIPConfig(text_config=part | {"vocab_size": 9}, vision_config=part | {"image_size": 32, "patch_size": 8}, projection_dim=8))
    images = torch.rand(1, 3, 32, 32)
    other = images.clone()
    other[:, :, :8, :8] = 0
    with torch.no_grad():
        (whole, patches), (whole2, patches2) = C.read_both(model, images), C.read_both(model, other)
    assert torch.allclose(patches[0, 1:], patches2[0, 1:], atol=1e-6)
    assert not torch.allclose(patches[0, 0], patches2[0, 0], atol=1e-3) and not torch.allclose(whole, whole2, atol=1e-4)
    want = model.eval().get_image_features(pixel_values=images)
    want = F.normalize(getattr(want, "pooler_output", want), dim=-1)
    assert torch.allclose(whole, want, atol=1e-5)  # the class token is CLIP's own


def test_contrast_by_hand():
    """Two pairs, scale 1: images (1,0), (0,1); texts the same: each row's loss is ln(1 + e^-1)."""
    eye, none = torch.eye(2), torch.eye(2, dtype=torch.bool)
    assert T.contrast(eye, eye, none, torch.tensor(1.0)).item() == pytest.approx(np.log(1 + np.exp(-1)))
    # equal captions are no negatives: the target of both rows is (1/2, 1/2)
    both = torch.ones(2, 2, dtype=torch.bool)
    assert T.contrast(eye, eye, both, torch.tensor(1.0)).item() == pytest.approx(np.log(np.e + 1) - 0.5)
