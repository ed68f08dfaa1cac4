"""The miniature foundation encoders: shipped weights know fresh pictures, remaking them starts the same way."""

import numpy as np
import pytest
import torch

from common.backbones import ImageEncoder
from common.files import read_json
from common.networks import street
from data import foundation


@pytest.fixture(scope="module")
def pictures():
    """Photographs of streets that neither the encoders nor any world has seen."""
    return foundation.make_pictures(rigs=2, seed=12345)


@pytest.mark.parametrize("name", ["street", "street-depth"])
def test_shipped_weights_know_fresh_pictures(name, pictures):
    card, scores = read_json(street.WEIGHTS / f"{name}.json"), foundation.score(street.load_street(name), pictures, 0)
    assert scores.keys() == card["scores"].keys()
    assert scores["miou_2d"] > 0.6 * card["scores"]["miou_2d"]  # twelve pictures: not all classes show
    if name == "street-depth":
        assert scores["depth_within_one_bin"] > 0.8 * card["scores"]["depth_within_one_bin"]
    size = (street.WEIGHTS / f"{name}.safetensors").stat().st_size
    assert size < 2e6 and len(card["commit"].split("-")[0]) == 40


def test_remaking_starts_the_same_way(pictures):
    nets = [foundation.train(pictures, True, steps=2, seed=0, batch=2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in nets), strict=True))


def test_pictures_hold_what_they_show(pictures):
    n, (h, w) = 12, (28, 50)
    assert pictures.images.shape == (n, 112, 200, 3) and pictures.classes.shape == pictures.depth.shape == (n, h, w)
    assert ((pictures.depth > 0) | (pictures.classes == 17)).all()  # only the sky has no depth
    kinds, rows = pictures.objects[:, 1].astype(int), pictures.objects[:, 0].astype(int)
    u, v = (np.clip(pictures.objects[:, a] / street.STRIDE, 0, top - 1).astype(int) for a, top in ((2, w), (3, h)))
    thing = (kinds >= 1) & (kinds <= 10) & (pictures.objects[:, 4:].min(1) > 6)
    assert (pictures.classes[rows, v, u] == kinds)[thing].mean() > 0.6  # the middle of most boxes shows the object


def test_an_encoder_of_a_method_starts_from_them():
    encoder = ImageEncoder("street-depth", 16)
    assert encoder(torch.rand(2, 3, 3, 56, 100)).shape == (2, 3, 16, 14, 25)
    loaded = street.load_street("street-depth").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in encoder.backbone.state_dict().items())
