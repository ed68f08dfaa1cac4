"""The miniature foundation encoders: shipped weights know fresh pictures, remaking starts the same way, words."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.backbones import ImageEncoder
from common.files import InputError, read_json
from common.networks import street
from common.networks.tinyclip import TEMPLATES, read_words
from common.nuscenes import FREE
from data import captions, foundation

NAMES = ("street", "street-depth")


@pytest.fixture(scope="module")
def pictures():
    """Photographs of a street that neither the encoders nor any world has seen."""
    return foundation.photograph_street(12345, 0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_know_fresh_pictures(name, pictures):
    card = read_json(street.WEIGHTS / f"{name}.json")
    scores = foundation.score(street.load_street(name), pictures, 0)
    assert scores.keys() == card["scores"].keys()
    for score, share in (("miou_2d", 0.6), ("naming", 0.6), ("depth_within_one_bin", 0.8)):
        if score in scores:  # eighteen pictures: not all classes show
            assert scores[score] > share * card["scores"][score]
    assert ("depth_within_one_bin" in scores) == (name == "street-depth")
    assert len(card["commit"].split("-")[0]) == 40 and card["licence"] == "Apache-2.0"


def test_weights_are_small():
    sizes = [path.stat().st_size for path in street.WEIGHTS.glob("*.safetensors")]
    assert len(sizes) >= 2 and max(sizes) < 2e6 and sum(sizes) < 6e6


def test_remaking_starts_the_same_way(pictures):
    nets = [foundation.train(pictures, True, steps=2, seed=0, batch=2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in nets), strict=True))
    again = foundation.photograph_street(12345, 0, 1)
    assert np.array_equal(again.images, pictures.images[:6]) and again.facts == pictures.facts[:6]


def test_pictures_hold_what_they_show(pictures):
    n, (h, w) = 18, (28, 50)
    assert pictures.images.shape == (n, *street.SIZE, 3) and len(pictures.facts) == n
    assert pictures.classes.shape == pictures.depth.shape == pictures.regions.shape == (n, h, w)
    classes = foundation.OCC3D_ID[pictures.classes]
    assert ((pictures.depth > 0) | (classes == FREE)).all()  # only the sky has no depth
    kinds, rows = pictures.objects[:, 1].astype(int), pictures.objects[:, 0].astype(int)
    u, v = (np.clip(pictures.objects[:, a] / 4, 0, top - 1).astype(int) for a, top in ((2, w), (3, h)))
    thing = (kinds >= 1) & (kinds <= 10) & (pictures.objects[:, 4:].min(1) > 6)
    assert (classes[rows, v, u] == kinds)[thing].mean() > 0.5  # most boxes' middles show the object
    from data.driving.streets import LIDARSEG_NAMES

    for picture, region, facts in zip(pictures.classes, pictures.regions, pictures.facts, strict=True):
        assert region.max() == len(facts)
        for k, fact in enumerate(facts, 1):  # a region's cells are of the kind that its caption names
            kind = LIDARSEG_NAMES.index(fact["kind"])
            assert not (region == k).any() or (picture[region == k] == kind).mean() > 0.9


# --- words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, says", [
    (lambda w, m: (w | {"backbone.lateral.0.bias": w["backbone.lateral.0.bias"] * np.nan}, m), "lateral.0.bias is missing, of"),
    (lambda w, m: ({f"module.{k}": v for k, v in w.items()}, m), "is missing, of another shape or not finite"),
    (lambda w, m: (w | {"read.words.weight": w["read.words.weight"].flatten()}, m), "read.words.weight is missing, of"),
    (lambda w, m: (w, None), "not an encoder of data.foundation"), (None, "not an encoder of data.foundation"),
])
def test_a_damaged_encoder_is_one_line(change, says, tmp_path):
    path = tmp_path / "x.safetensors"
    with safe_open(street.WEIGHTS / "street.safetensors", "pt") as file:
        weights, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    weights, meta = change(weights, meta) if change else (weights, meta)
    save_file(weights, path, meta)
    path.write_bytes(path.read_bytes()[: None if change else -9])
    with pytest.raises(InputError, match=f"{path}: .*{says}"):
        street.load_street(path)


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_of_the_project_has_an_unknown_word(name):
    net = street.load_street(name)
    lists = [read_words(path) for path in sorted(captions.OPENSET.glob("*.txt"))]
    texts = [*TEMPLATES, *(w for words in lists for given in words.values() for w in given)]
    assert len(lists) >= 3 and not [word for text in texts for word in net.text.unknown(text)]
    assert net.text.unknown("a Zebra, ein Fußgänger und 車 on the ROAD.") == ["zebra", "ein", "fußgänger", "und", "車", "on"]


def test_the_texts_order_and_padding_change_nothing():
    text = street.load_street("street").text
    alone, padded, turned = text(["a red car"])[0], text(["a red car", "a large yellow vehicle with an arm"])[0], text(["car red a"])[0]
    assert torch.allclose(alone, padded, atol=1e-6) and torch.allclose(alone, turned, atol=1e-6)
    assert torch.allclose(alone.norm(), torch.tensor(1.0), atol=1e-5)


def test_hidden_names_are_in_no_text():
    names = foundation.Names(("trailer", "traffic_cone"))
    words = {word for group in names.groups for text in group for word in text.split()}
    assert not {"trailer", "cone"} & (words | set(names.vocabulary())) and "traffic" in words  # traffic light
    open_names = foundation.Names()
    assert len(open_names.groups) == len(names.groups) + 2 and {"trailer", "cone"} <= set(open_names.vocabulary())


# --- as a backbone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_of_a_method_starts_from_them(name):
    encoder, whole = ImageEncoder(name, 16), street.load_street(name)
    images = torch.rand(2, 3, 3, 56, 100)
    assert encoder(images).shape == (2, 3, 16, 14, 25)
    seen = encoder.see(images[0])
    assert seen.shape[1] == street.KNOWN[name] and torch.allclose(seen[:, :64], whole(images[0]), atol=1e-5)
    assert torch.allclose(seen[:, 64:82].sum(1), torch.ones(3, 14, 25), atol=1e-5)
    shapes = {k: v.shape for k, v in encoder.state_dict().items()}
    assert shapes == {k: v.shape for k, v in ImageEncoder(name, 16, pretrained=False).state_dict().items()}


def test_a_frozen_encoder_learns_its_neck_alone_and_reads_features():
    encoder, images = ImageEncoder("street+frozen", 16).train(), torch.rand(1, 2, 3, 56, 100)
    encoder(images).sum().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == {"neck.weight", "neck.bias"}
    assert torch.allclose(encoder(encoder.see(images[0])[None]), encoder(images), atol=1e-5)
    with pytest.raises(InputError, match="conv.frozen"):
        ImageEncoder("conv+frozen", 16)
