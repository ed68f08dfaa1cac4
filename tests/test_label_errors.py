"""data/driving/label_errors.py: the errors of the labeler `world` are as many as stated, and persist as
stated.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from common.files import InputError
from common.labelers import Maps, make_labeler, number_of, quantize
from common.nuscenes import FREE
from data.driving import label_errors as E
from data.driving.label_errors import (CONFUSED, DEPTH, REGION, SEMANTIC, Draws, confused_class, degrade_depth,
                                       degrade_semantic, find_objects)
from fake_world import FakeWorld


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 scenes of two frames without ego motion: everything is the same twice, except what is drawn per
    frame."""
    return FakeWorld(tmp_path_factory.mktemp("world"), scenes=24).write()


def same(a: Maps, b: Maps) -> bool:
    return np.array_equal(a.semantic, b.semantic) and np.array_equal(a.depth, b.depth)


def test_exact_levels_change_nothing_and_equal_files(world):
    exact = make_labeler("world", world, depth_level="exact", semantic_level="exact")
    semantic, depth, _ = world.exact(5)
    assert np.array_equal(exact(5).semantic, semantic)
    assert np.array_equal(exact(5).depth, quantize(depth) / np.float32(256))
    assert same(exact(5), make_labeler("files", world, maps=world.root / "exact")(5))
    only_depth = make_labeler("world", world, semantic_level="exact", correlation=0.5, seed=3)
    assert np.array_equal(only_depth(5).semantic, semantic)
    assert not np.array_equal(only_depth(5).depth, exact(5).depth)
    only_semantic = make_labeler("world", world, depth_level="exact")(5)
    assert np.array_equal(only_semantic.depth, exact(5).depth)
    assert not np.array_equal(only_semantic.semantic, semantic)
    assert exact.note == "synthetic maps, depth exact, semantics exact"
    assert only_depth.note == "synthetic maps, depth mild, semantics exact, error correlation 0.5, seed 3"


def test_wrong_options_are_refused(world):
    for options, message in (({"depth_level": "bad"}, "--depth-level bad: one of exact, mild, heavy"),
                             ({"semantic_level": "x"}, "--semantic-level"),
                             ({"correlation": 1.5}, "--correlation 1.5")):
        with pytest.raises(InputError, match=message):
            make_labeler("world", world, **options)


def test_errors_depend_on_seed_and_frame_but_not_on_order_or_process(world):
    first, second = make_labeler("world", world), make_labeler("world", world)
    forward = [first(i) for i in (0, 1, 2)]
    backward = [second(i) for i in (2, 1, 0)][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not same(forward[0], forward[1])  # the scene stands still: only the frame's own draws differ
    assert not same(forward[0], make_labeler("world", world, seed=1)(0))
    # a hash that does not change from process to process, or from one numpy to the next
    assert number_of(0, "depth-scale", "scene", "scene-0061") == 6483400870716866175
    assert E._uniform(np.array([0, 7]), 1, "x").tolist() == [0.9323923921415931, 0.3834451717635308]


def errors_of(world, level, correlation, seeds=2):
    """-> semantic error rate, log-depth deviation, their standard errors, and how well two frames of a scene agree."""
    exact = make_labeler("world", world, depth_level="exact", semantic_level="exact")
    true = [exact(i) for i in range(len(world))]
    wrong, log, absrel, rate = [], [], [], []
    for seed in range(seeds):
        options = dict(depth_level=level, semantic_level=level, correlation=correlation, seed=seed)
        labeler = make_labeler("world", world, **options)
        for i in range(len(world)):
            made, labelled = labeler(i), true[i].semantic < FREE
            wrong.append((made.semantic != true[i].semantic) & labelled)
            rate.append(wrong[-1].sum() / labelled.sum())
            known = (true[i].depth > 0) & (made.depth > 0)
            ratio = np.where(known, made.depth / np.maximum(true[i].depth, 1e-3), 1)
            log.append(np.log(ratio))
            absrel.append(np.abs(ratio[known] - 1).mean())
    wrong, log = np.stack(wrong), np.stack(log)
    pairs = np.reshape(rate, (-1, 2)).mean(1), log.std((1, 2, 3)).reshape(-1, 2).mean(1)  # two frames a scene
    semantic, deviation = ((one.mean(), one.std(ddof=1) / np.sqrt(len(one))) for one in pairs)
    persistence = (wrong[0::2] & wrong[1::2]).mean() / wrong.mean()  # P(wrong in a frame | wrong in the other)
    agreement = spearmanr(log[0::2].ravel(), log[1::2].ravel())[0]  # ranks: flying pixels at edges are huge and alike
    return SimpleNamespace(
        semantic=semantic, log=deviation, absrel=np.mean(absrel), persistence=persistence, agreement=agreement)


@pytest.mark.parametrize(
    "level, absrel, semantic", [("mild", (0.04, 0.065), (0.07, 0.11)), ("heavy", (0.17, 0.25), (0.17, 0.25))]
)
def test_correlation_moves_errors_over_time_and_not_their_number(world, level, absrel, semantic):
    """The scenes stand still, so an error that persists is wrong in both frames, at the same pixel."""
    independent, mixed = (errors_of(world, level, rho) for rho in (0.0, 0.8))
    for one in (independent, mixed):
        assert absrel[0] < one.absrel < absrel[1] and semantic[0] < one.semantic[0] < semantic[1]
        assert all(error < 0.08 * value for value, error in (one.semantic, one.log))  # so the next lines can fail
    for (a, a_error), (b, b_error) in ((mixed.semantic, independent.semantic), (mixed.log, independent.log)):
        assert abs(a - b) < 3 * np.hypot(a_error, b_error)
    # what has no prompt (other_flat) is wrong in each frame, and depth bleeds over the same edges, always
    assert independent.persistence < 0.35 and mixed.persistence > 0.5
    assert independent.agreement < 0.4 and mixed.agreement > 0.6  # 0.8, less the noise that is the frame's own


def test_full_correlation_repeats_each_semantic_error(world):
    labeler = make_labeler("world", world, semantic_level="heavy", correlation=1.0)
    for i in (0, 10):
        a, b = labeler(i), labeler(i + 1)
        assert np.array_equal(a.semantic, b.semantic)
        assert not np.array_equal(a.depth, b.depth)  # the depth noise is the frame's own


def test_draws_have_the_stated_marginals_at_each_correlation():
    ids = np.arange(1, 20001)
    for rho in (0.0, 0.3, 0.8, 1.0):
        a, b = (Draws(5, "scene-0001", frame, rho) for frame in ("t0", "t1"))
        x, y = a.normal("field", (100, 200)), b.normal("field", (100, 200))
        assert x.std() == pytest.approx(1, abs=0.02) and abs(x.mean()) < 0.03
        assert np.corrcoef(x.ravel(), y.ravel())[0, 1] == pytest.approx(rho, abs=0.02)
        x, y = a.normal_of("offset", ids), b.normal_of("offset", ids)
        assert x.std() == pytest.approx(1, abs=0.02) and abs(x.mean()) < 0.03
        assert np.corrcoef(x, y)[0, 1] == pytest.approx(rho, abs=0.02)
        u, v = a.uniform_of("event", ids), b.uniform_of("event", ids)
        assert 0 < u.min() and u.max() < 1
        p = 0.1  # an event of probability p
        assert (u[:, 0] < p).mean() == pytest.approx(p, abs=0.009)
        again = (v[u[:, 0] < p, 0] < p).mean()
        assert again == pytest.approx(rho * rho + (1 - rho * rho) * p, abs=0.035)  # both frames take the scene's draw
        assert np.corrcoef(u[:, 0], u[:, 1])[0, 1] == pytest.approx(0, abs=0.03)


def test_smooth_fields_have_unit_variance_everywhere():
    for periodic in (False, True):
        weights = E._spline(50, 9, periodic)
        assert np.allclose((weights**2).sum(1), 1, atol=1e-6) and (weights >= 0).all()
    assert np.abs(np.diff(E._image_field(np.eye(4, 6, dtype=np.float32)[None], 64, 96), axis=2)).max() < 0.1
    wrap = E._spline(80, 10, periodic=True) @ np.eye(10, dtype=np.float32)[0]  # around: the ends are neighbours
    assert abs(wrap[0] - wrap[-1]) < np.abs(np.diff(wrap)).max() + 1e-6


def test_an_object_keeps_its_confused_class_over_time_and_in_all_cameras():
    ids = np.arange(1, 4001)
    for true, (factor, others) in CONFUSED.items():
        label = np.full(len(ids), true, np.uint8)
        frames = []
        for frame in ("t0", "t1"):
            uniform = Draws(0, "s", frame, 1.0).uniform_of("semantic-instance", ids)
            frames.append(confused_class(label, uniform, 0.1))
        assert np.array_equal(*frames)
        wrong = frames[0][frames[0] != true]
        sigma = np.sqrt(0.1 * factor / len(ids))
        assert len(wrong) / len(ids) == pytest.approx(0.1 * factor, abs=4 * sigma)
        assert set(wrong.tolist()) == set(others)
        uniform = Draws(0, "s", "t1", 0.0).uniform_of("semantic-instance", ids)
        assert not np.array_equal(confused_class(label, uniform, 0.1), frames[0])


def test_small_objects_are_missed_more_often_than_large_ones_and_take_the_background():
    """100 objects of 1, 4x4 and 6x6 px on a road of 160x160 px: each is missed with missed * exp(-area /
    small)."""
    errors = SEMANTIC["heavy"]._replace(instance=0, region=0, outline=0, uncertain=0)
    K = np.array([[[160.0, 0, 80], [0, 160, 80], [0, 0, 1]]])
    v, u = np.meshgrid(np.arange(160), np.arange(160), indexing="ij")
    for side in (1, 4, 6):
        inside = (v % 16 < side) & (u % 16 < side)
        instance = np.where(inside, 1 + v // 16 * 10 + u // 16, 0).astype(np.uint16)[None]
        semantic = np.where(inside, 7, 11).astype(np.uint8)[None]
        missed = 0
        for frame in range(10):
            made = degrade_semantic(
                semantic, np.ones((1, 160, 160), np.float32), find_objects(instance), K, np.eye(4)[None],
                Draws(frame, "s", str(frame), 0.5), errors)  # fmt: skip
            assert set(np.unique(made).tolist()) == {7, 11}
            kept = np.bincount(instance[made == 7], minlength=101)[1:]
            assert set(kept.tolist()) == {0, side**2}  # whole or not at all
            missed += (kept == 0).mean() / 10
        expected = errors.missed * np.exp(-(side**2) / 160**2 / errors.small)
        assert 0.3 < expected < 0.95 and missed == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 1000))


def test_fill_takes_the_nearest_label():
    semantic = np.array([[1, 9, 9, 9, 9, 2]], np.uint8)
    E._fill(semantic, semantic == 9)
    assert semantic.tolist() == [[1, 1, 1, 2, 2, 2]]
    everything = np.full((3, 3), 5, np.uint8)
    E._fill(everything, np.ones((3, 3), bool))
    assert (everything == 5).all()  # nothing to take from


def look_down(x: float, y: float, size: int = 96, height: float = 10.0):
    """A camera `height` m above (x, y) that looks straight down with 1 px per metre, image x along global
    x."""
    K = np.array([[[height, 0, size / 2], [0, height, size / 2], [0, 0, 1.0]]])
    T = np.array([[1.0, 0, 0, x], [0, -1, 0, y], [0, 0, -1, height], [0, 0, 0, 1]])[None]
    return K, T


def test_region_errors_stay_at_their_place_in_the_world():
    """The camera moves by 6 px = 6 m: so does the error map; 512 m on, it repeats."""
    semantic, depth = np.full((1, 96, 96), 13, np.uint8), np.full((1, 96, 96), 10, np.float32)

    def regions(x, y, frame, rho):
        K, T = look_down(x, y)
        rays = T[:, :3, :3] @ np.linalg.inv(K)
        return E._confuse_regions(semantic, depth, rays, T[:, :2, 3], Draws(0, "s", frame, rho), 0.1)[0]

    here, there = regions(700, 300, "t0", 1.0), regions(706, 300, "t1", 1.0)
    low, high = REGION[13]
    assert set(np.unique(here).tolist()) <= {13, low[1], high[1]} and (here != 13).mean() > 0.05
    assert np.array_equal(here[:, 6:], there[:, :-6])
    assert not np.array_equal(here[:, 6:], regions(706, 300, "t1", 0.0)[:, :-6])
    assert np.array_equal(regions(700 + 512, 300 - 1024, "t0", 1.0), here)
    assert (regions(700, 300, "t0", 1.0)[:, :-1] == here[:, 1:]).mean() > 0.9  # places, not speckle

    rates = np.zeros(256)  # and the two tails have the stated probabilities, at any correlation
    for k in range(60):
        rates += np.bincount(regions(700, 300, str(k), 0.0).ravel(), minlength=256) / semantic.size / 60
    assert rates[low[1]] == pytest.approx(0.1 * low[0], rel=0.25)
    assert rates[high[1]] == pytest.approx(0.1 * high[0], rel=0.25)


def test_outlines_move_by_the_stated_amount_and_holes_have_the_stated_share():
    """A vertical edge in six cameras of 160x280 px; displacement and holes are functions of the viewing
    direction."""
    h, w = 160, 280
    semantic = np.full((6, h, w), 11, np.uint8)
    semantic[:, :, w // 2 :] = 13
    K, T, T_global = FakeWorld(".", shape=(h, w)).calibration(0)
    rays = (T_global @ T)[:, :3, :3] @ np.linalg.inv(K.astype(float))
    shift, holes = [], []
    for k in range(30):
        fields = E._bearing_fields(rays, h, w, Draws(k, "s", "t", 0.5))
        moved = E._displace(semantic, fields, 2.0, 0.0)
        shift.append((moved == 11).sum(2) - w // 2)  # (6, h) columns the edge has moved by
        holes.append((E._displace(semantic, fields, 0.0, 0.05) == FREE).mean())
    assert np.std(shift) == pytest.approx(2.0, rel=0.15) and abs(np.mean(shift)) < 0.3
    assert np.abs(np.diff(np.concatenate(shift), axis=1)).mean() < 0.5  # smooth along the edge
    assert np.mean(holes) == pytest.approx(0.05, rel=0.25)
    assert np.array_equal(E._displace(semantic, fields, 0.0, 0.0), semantic)
    turned = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]) @ rays  # the car turns by 90 degrees: other directions
    a, b = (E._bearing_fields(r, h, w, Draws(0, "s", "t", 1.0)) for r in (rays, turned))
    assert np.corrcoef(a[..., 0].ravel(), b[..., 0].ravel())[0, 1] < 0.5


def test_depth_bleeds_over_edges_only():
    depth = np.full((9, 20), 10, np.float32)
    depth[:, 10:] = 40
    depth[:, 18:] = 0  # sky
    soft = E._bleed(depth, 3)
    assert np.allclose(soft[4, [9, 10]], [20, 30])  # (10 + 10 + 40) / 3 and (10 + 40 + 40) / 3
    assert np.array_equal(soft[:, :9], depth[:, :9]) and np.array_equal(soft[:, 11:], depth[:, 11:])
    slope = np.linspace(10, 11, 20, dtype=np.float32)[None].repeat(9, 0)
    assert np.array_equal(E._bleed(slope, 3), slope)  # a slope is no edge


def test_depth_noise_grows_with_depth_and_far_depth_is_missing():
    zero = DEPTH["mild"]._replace(scale=0, bias=0, field=0, instance=0)
    none = find_objects(np.zeros((2, 40, 60), np.uint16))
    deviation = []
    for z in (5, 50):
        logs = [
            np.log(degrade_depth(np.full((2, 40, 60), z, np.float32), none, Draws(k, "s", "t", 1.0), zero) / z)
            for k in range(20)
        ]
        deviation.append(np.std(logs))
        assert deviation[-1] == pytest.approx(zero.noise + zero.noise_far * z, rel=0.1)
    assert deviation[1] > deviation[0]
    draws, ones = Draws(0, "s", "t", 1.0), np.ones((2, 40, 60), np.float32)
    far = degrade_depth(120 * ones, none, draws, zero)
    assert 0.3 < (far == 0).mean() < 0.7 and 100 < far.max() <= zero.far == 120
    assert (degrade_depth(0 * ones, none, draws, DEPTH["heavy"]) == 0).all()  # sky


def test_an_objects_depth_error_is_its_own_and_persists():
    instance = np.zeros((1, 30, 40), np.uint16)
    instance[0, 5:10, 5:10], instance[0, 20:25, 20:25] = 4, 9
    only = DEPTH["heavy"]._replace(scale=0, bias=0, field=0, noise=0, noise_far=0)
    depth = np.full((1, 30, 40), 12, np.float32)
    a, b = (degrade_depth(depth, find_objects(instance), Draws(0, "s", t, 1.0), only)[0] for t in ("t0", "t1"))
    assert np.array_equal(a, b) and np.allclose(a[0], 12)
    assert len(np.unique(a[5:10, 5:10])) == 1 and a[7, 7] != 12 and a[7, 7] != a[22, 22] != 12
