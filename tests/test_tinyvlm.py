"""The tiny PaliGemma 2, its vision tower and its lessons on pictures of other worlds."""

from functools import partial

import numpy as np
import pytest
import torch

from common.files import InputError, read_json
from common.networks import paligemma as P
from common.networks.tinyvlm import CAMERAS, TOKEN, WEIGHTS, Sizes, StreetTower
from common.nuscenes import FREE
from common.questions import CLASSES, sentences
from data import tinyvlm as T
from data.foundation import Pictures, photograph_street

SIZES = Sizes(image=64, patch=16, width=32, layers=2)  # 4 x 4 tokens


@pytest.fixture(scope="module")
def pictures():
    return photograph_street(77, 0, 2)


def fresh():
    torch.manual_seed(0)
    return P.random_host(SIZES, sentences())


def test_a_token_is_what_stands_in_its_patch_and_where_that_is():
    torch.manual_seed(0)
    tower, images = StreetTower(4).eval(), torch.rand(12, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        tokens = tower(images).last_hidden_state.view(12, 4, 4, -1)
        cells = tower.cells(images)
        other = cells.clone()
        other[..., :8, 24:] += 1  # the upper right; a neck's 3 x 3 see a little beyond a patch
        moved = (tower.tokens(cells) - tower.tokens(other)).abs().amax(-1)[0]
    assert tokens.shape[-1] == StreetTower.width(4) == TOKEN + 4 * (CAMERAS + 1)
    assert torch.equal(tokens[..., :TOKEN], tower.tokens(cells)) and moved[:1, 2:].min() > 3 * moved[2:].max()
    column, row = tokens[..., TOKEN : TOKEN + 24].argmax(-1), tokens[..., TOKEN + 24 :].argmax(-1)
    assert (row == torch.arange(4)[None, :, None]).all() and tokens[..., TOKEN:].sum() == 2 * 12 * 16
    camera = torch.arange(12) % CAMERAS  # two keyframes of one rig
    assert (column == 4 * camera[:, None, None] + torch.arange(4)).all()


def test_targets_are_where_the_objects_are():
    """Two cars in one token, the larger told; one bus in another; sky above."""
    classes = np.full((1, 28, 50), 255, np.uint8)  # sky
    classes[:, 14:] = 24  # road
    objects = np.float32([[0, 4, 60, 70, 10, 10], [0, 4, 70, 70, 30, 20], [0, 3, 190, 10, 50, 28],
                          [0, 17, 1, 1, 9, 9]])
    black, far = np.zeros((1, 112, 200, 3), np.uint8), np.full((1, 28, 50), 7, np.float16)
    pictures = Pictures(black, classes, far, objects, np.zeros((1, 28, 50), np.uint8), [[]])
    count, box, shares, depth = T.token_targets(pictures, 4)
    assert count[0, 2, 1, 3] == 2 and count[0, 0, 3, 2] == 1 and count.sum() == 3
    expected = torch.tensor([-0.1, 0.0, np.log(0.6), np.log(20 / 28)]).float()
    assert torch.allclose(box[0, 2, 1, 3], expected, atol=1e-5)
    assert shares[0, 0, :, FREE].eq(1).all() and shares[0, 3, :, 11].eq(1).all()
    assert torch.allclose(depth, torch.full_like(depth, np.log(7)), atol=1e-3)
    assert T.count_objects(pictures)[0].tolist() == [0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]


def test_questions_about_a_picture_are_true_and_balanced():
    counts, rng = np.array([0, 0, 0, 1, 12, 0, 0, 3, 0, 0, 0], np.uint8), np.random.default_rng(0)
    seen = {"yes": 0, "no": 0}
    truth = {"bus": 1, "car": 12, "pedestrian": 3}
    for _ in range(200):
        asked = T.picture_questions(counts, rng)
        assert len(asked) == 12
        for question, answer in asked:
            name = max((c for c in CLASSES if c in question), key=len)
            number = truth.get(name, 0)
            if answer in seen:
                seen[answer] += 1
                assert (answer == "yes") == (number > 0)
                assert question.startswith(("Are there any", "Is there a"))
            else:
                assert answer == str(min(number, 10)) and question.startswith("How many")
    assert abs(seen["yes"] - seen["no"]) < 0.15 * 1600
    assert {a for q, a in T.picture_questions(np.zeros(11, np.uint8), rng)} == {"no", "0"}  # nothing there
    assert {a for q, a in T.picture_questions(np.ones(11, np.uint8), rng)} == {"yes", "1"}


def no_questions(images, asked):
    assert len(asked) == len(images) and all(len(rows) == 12 for rows in asked)
    return torch.zeros((), requires_grad=True), 0.0


def test_lessons_teach_the_neck_then_the_words(pictures):
    """The foundation's encoder stays; the first lesson moves the neck alone, the second all but the tower."""
    vlm = P.PaliGemma(fresh(), 1, "image")
    state = lambda: {k: v.clone() for k, v in vlm.net.state_dict().items()}  # noqa: E731
    moved = lambda a, b: {k for k in a if not torch.equal(a[k], b[k])}  # noqa: E731
    first = state()
    known = T.learn_to_see(vlm.net.model.vision_tower, pictures, steps=30, batch=4)
    second = state()
    assert 0 <= known["recall"] <= 1 and all("vision_tower.neck" in k for k in moved(first, second))
    assert moved(first, second)
    assert 0 <= T.learn_to_answer(vlm.net, partial(P.answer_loss, vlm), pictures, steps=3, batch=4) <= 1
    changed = moved(second, state())
    assert not any("vision_tower" in k for k in changed)
    for part in ("multi_modal_projector", "language_model.layers.1", "embed_tokens"):
        assert any(part in k for k in changed), part


def test_folder_is_a_host_and_is_made_once(tmp_path, pictures):
    vlm, processor = fresh()
    out = T.make_tinyvlm(tmp_path / "vlm", vlm, processor, no_questions, steps=4, pictures=pictures)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vlm"]
    assert {"recall", "precision", "answers_right", "steps", "start"} <= set(read_json(out / "tinyvlm.json"))
    weights = P.load_host(str(out)).net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in vlm.state_dict().items())
    stamp = (out / WEIGHTS).stat().st_mtime_ns
    assert T.make_tinyvlm(out, *fresh(), no_questions, steps=4, pictures=pictures) == out
    assert (out / WEIGHTS).stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="another steps"):
        T.make_tinyvlm(out, *fresh(), no_questions, steps=8, pictures=pictures)
    (out / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(InputError, match=WEIGHTS):
        P.load_host(str(out))


def test_a_small_host_is_pretrained_once(tmp_path, monkeypatch, pictures):
    """--vlm tiny: the first use makes it, and draws no random number of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "make_tinyvlm", partial(T.make_tinyvlm, pictures=pictures))
    monkeypatch.setitem(P.SIZES, "tiny", (SIZES, 4))
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        weights = P.load_host("tiny", sentences()).net.state_dict()
        states.append((torch.rand(3), weights))
    (drawn, first), (again, second) = states
    assert torch.equal(drawn, again) and all(torch.equal(first[name], second[name]) for name in first)
    name = next(name for name in first if "neck" in name)
    assert not torch.equal(first[name], fresh().net.state_dict()[name])
    assert read_json(next((tmp_path / "data/worlds").glob("tinyvlm-*/tinyvlm.json")))["width"] == 32
