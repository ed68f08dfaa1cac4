"""The tiny PaliGemma 2 and its lesson on pictures of other worlds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import occvla as O
from common.files import InputError, read_json
from common.nuscenes import FREE
from data import tinyvlm as T
from data.tinyclip import SEED_OFFSET

CFG = replace(O.TINY, tiny_width=32, tiny_layers=2, tiny_vision_layers=2, image_size=32, tiny_patch=16)
WORDS = {3: [[300], [301]], 4: [[302], [303, 304]], 10: [[305], [306]]}


@pytest.fixture(scope="module")
def pictures():
    return T.make_pictures(12, 32)


def fresh():
    torch.manual_seed(0)
    return O.tiny_host(CFG)


def test_pictures_show_streets_and_their_classes(pictures):
    images, classes = pictures
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8 and classes.shape == (12, 32, 32) and classes.max() == FREE
    assert all(len(np.unique(image.reshape(-1, 3), axis=0)) > 50 for image in images)
    assert np.mean([len(np.unique(ids)) for ids in classes]) >= 3
    above, below = classes[:, :8], classes[:, -8:]
    assert (above == FREE).mean() > 3 * (below == FREE).mean()  # sky is above
    assert np.isin(below, (11, 12, 13, 14)).mean() > 0.4  # what one drives or walks on is below


def test_pictures_are_repeatable_and_of_other_worlds(pictures):
    again = T.make_pictures(12, 32)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, again, strict=True))
    assert not np.array_equal(T.make_pictures(6, 32, seed=1)[0], pictures[0][:6])
    assert SEED_OFFSET > 10**8


def test_class_map_has_the_layout_of_the_picture():
    """Each token draws its own square of cells."""
    vlm, _ = fresh()
    lesson = T.Lesson(vlm, WORDS).eval()
    with torch.no_grad():
        lesson.draw.weight.zero_()
        lesson.draw.bias.copy_(torch.arange(T.CELLS**2).float().repeat_interleave(FREE + 1))
        maps, named = lesson(torch.rand(2, 3, 32, 32))
    assert maps.shape == (2, 8, 8, FREE + 1) and named.shape == (2, 4, 3)
    assert torch.equal(maps[0, :4, :4, 0], torch.arange(16.0).view(4, 4)) and torch.equal(maps[0, 4:, 4:, 5], torch.arange(16.0).view(4, 4))
    with torch.no_grad():  # and a token comes from its own patch
        lesson.tower.embeddings.position_embedding.weight.zero_()
        for layer in lesson.tower.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
        image = torch.rand(1, 3, 32, 32)
        other = image.clone()
        other[..., :16, 16:] += 1
        lesson.draw.weight.normal_()
        same = torch.isclose(lesson(image)[0], lesson(other)[0]).all(-1)[0]
    assert not same[:4, 4:].any() and same[4:].all() and same[:, :4].all()


def test_lesson_teaches_vision_and_words_and_leaves_the_layers(pictures):
    vlm, _ = fresh()
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    known = T.pretrain(vlm, WORDS, *pictures, steps=25, patch=16, batch=4)
    assert known["cells_right"] > 0.3 and 0 < known["commonest"] < 1
    moved = {k for k, v in vlm.state_dict().items() if not torch.equal(v, before[k])}
    assert any("vision_tower.encoder.layers.1" in k for k in moved) and any("multi_modal_projector" in k for k in moved)
    assert not any("language_model.layers" in k for k in moved)
    embedding = next(k for k in moved if k.endswith("embed_tokens.weight"))
    rows = (vlm.state_dict()[embedding] != before[embedding]).any(1).nonzero()[:, 0].tolist()
    assert rows == [300, 301, 302, 303, 304, 305, 306]


def test_folder_is_a_paligemma_and_is_made_once(tmp_path):
    vlm, processor = fresh()
    out = T.make_tinyvlm(tmp_path / "vlm", vlm, processor, WORDS, steps=2, pictures=6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vlm"]
    assert {"cells_right", "commonest", "steps", "pictures"} <= set(read_json(out / "tinyvlm.json"))
    host = O.load_host(replace(CFG, vlm=str(out)))
    assert all(torch.equal(a, b) for a, b in zip(host.vlm.state_dict().values(), vlm.state_dict().values(), strict=True))
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert T.make_tinyvlm(out, *fresh(), WORDS, steps=2, pictures=6) == out and (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="another steps"):
        T.make_tinyvlm(out, *fresh(), WORDS, steps=3, pictures=6)


def test_tiny_host_is_pretrained_unless_told_otherwise(tmp_path, monkeypatch):
    """--vlm tiny --tiny-pretrain: the first use makes it, and draws no random number of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(O, "make_tinyvlm", lambda *args: T.make_tinyvlm(*args, pictures=6))
    cfg, states = replace(CFG, tiny_pretrain=2), []
    for _ in range(2):
        torch.manual_seed(5)
        host = O.load_host(cfg)
        states.append((torch.rand(3), host.vlm.state_dict()))
    assert torch.equal(states[0][0], states[1][0]) and all(torch.equal(a, b) for a, b in zip(states[0][1].values(), states[1][1].values(), strict=True))
    assert not torch.equal(next(iter(O.load_host(replace(cfg, tiny_pretrain=0)).vlm.state_dict().values())), next(iter(states[0][1].values())))
    assert read_json(next((tmp_path / "data/worlds").glob("tinyvlm-*/tinyvlm.json")))["width"] == 32
