"""Cached features of a frozen encoder: what a network makes of them is what it makes of the images."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import easyocc
from common import verbs
from common.backbones import ImageEncoder
from common.engine import stack
from common.frozen import digest, frozen_rows, frozen_views, weights_key
from common.nuscenes import NuScenesOccupancy

CFG = easyocc.Config(backbone="street-depth+frozen", channels=8, cnn3d="unet", cnn_channels=(8, 16), gates=True,
                     grid_stride=(4, 4, 2), logit_norm=False, norm="group", image_size=(56, 100), amp="off")


def test_cached_features_give_the_same_prediction(tiny_world, tmp_path, capsys):
    dataset = NuScenesOccupancy(tiny_world, split="all", image_size=CFG.image_size, cache=tmp_path / "cache")
    torch.manual_seed(0)
    net = easyocc.build(CFG).eval()
    views = frozen_views(net.encoder, dataset, tmp_path / "labels")
    assert f"{len(dataset)} keyframes" in capsys.readouterr().out and len(list(views.folder.iterdir())) == len(dataset)
    with torch.no_grad():
        seen, cached = (net(stack([item], "cpu")) for item in (verbs.inputs(dataset[0]), views(0)))
    assert (seen - cached).abs().mean() < 5e-3  # half precision; 1 - what hides a cell is small and enters as a log
    assert (seen.argmax(1) == cached.argmax(1)).float().mean() > 0.99
    stamps = [path.stat().st_mtime_ns for path in sorted(views.folder.iterdir())]
    again = frozen_views(net.encoder, dataset, tmp_path / "labels")
    assert stamps == [path.stat().st_mtime_ns for path in sorted(again.folder.iterdir())]
    assert frozen_views(ImageEncoder("street", 8), dataset, tmp_path) is None  # it learns: a step needs images


def test_other_weights_or_sizes_have_other_folders():
    keys = {weights_key(ImageEncoder(name, 8), size) for name in ("street", "street-depth") for size in ((56, 100), (64, 96))}
    assert len(keys) == 4
    torch.manual_seed(1)
    assert weights_key(ImageEncoder("street", 8), (56, 100)) in keys  # the neck, which is random, does not count


def test_a_step_reads_features_in_place_of_images(tiny_world, tmp_path):
    dataset = NuScenesOccupancy(tiny_world, split="all", image_size=CFG.image_size, cache=tmp_path / "cache")
    items, encoder = easyocc.Keyframes(dataset, tmp_path, CFG), ImageEncoder("street+frozen", 8)
    items.target = lambda i: torch.zeros(1)
    assert items(0, np.random.default_rng(0))["images"].shape == (6, 3, 56, 100)
    items.views = frozen_views(encoder, dataset, tmp_path)
    assert items(0, np.random.default_rng(0))["images"].shape == (6, 82, 14, 25)


def test_frozen_rows_are_made_once_and_whole(tmp_path):
    """Rows of nested tuples come back; a run killed on the way leaves no folder."""
    Inner = NamedTuple("Inner", [("wide", torch.Tensor), ("none", None)])
    Outer = NamedTuple("Outer", [("inner", Inner), ("flag", torch.Tensor)])
    asked = []

    def make(index: list[int]) -> Outer:
        asked.append(index)
        if dies and index[0] >= 4:
            raise KeyboardInterrupt
        x = torch.tensor(index, dtype=torch.float32)[:, None]
        return Outer(Inner(x.expand(-1, 300) / 8, None), x[:, 0] > 3)

    dies = True
    with pytest.raises(KeyboardInterrupt):
        frozen_rows(tmp_path / "rows", 9, make, size=4)
    assert not list(tmp_path.iterdir())
    dies = False
    for _ in range(2):
        rows = frozen_rows(tmp_path / "rows", 9, make, size=4)([8, 1])
        assert rows.flag.tolist() == [True, False] and rows.inner.none is None
        assert torch.equal(rows.inner.wide, torch.tensor([[1.0], [0.125]]).expand(-1, 300))
    assert asked.count([4, 5, 6, 7]) == 2  # killed, then made
    net = torch.nn.Linear(2, 2)
    assert digest(net, "a") != digest(net, "b") == digest(net, "b") != digest(torch.nn.Linear(2, 2), "b")


def test_what_a_frozen_encoder_knows_costs_no_gradient():
    """Its probabilities come apart from the neck's channels: one tensor of both would carry gradients to all."""
    images = torch.rand(1, 2, 3, 56, 100, generator=torch.Generator().manual_seed(0))
    for name in ("street-depth+frozen", "street-depth"):
        encoder = ImageEncoder(name, 8)
        features, classes, depth = encoder.with_known(images)
        assert [x.shape[2] for x in (features, classes, depth)] == [8, 18, 32] and features.requires_grad
        assert classes.requires_grad == depth.requires_grad == (not encoder.frozen)
        assert torch.equal(features, encoder(images))
