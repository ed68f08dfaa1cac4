"""Episodes: which are played, what a broken policy costs, what the policy reads, how success is summed up."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from common.files import InputError
from common.report import episodes
from common.report.episodes import Episode, Rules
from common.robot import make_environment
from experiments.runner import read_counts, score


@pytest.fixture(scope="module")
def env():
    return make_environment("tabletop", size=64)


def test_episodes_are_paired_and_perturbed_in_turn(env):
    rules = Rules(episodes=14, clean=2)
    listed = episodes.episode_list(env, rules)
    assert listed == episodes.episode_list(env, rules) and len(listed) == 18
    kinds = [env.category(task) for task, _ in listed]
    assert kinds.count("") == 2 and kinds.count("hard") == 2 and all(kinds.count(k) == 2 for k in set(kinds))
    starts = {(task.partition("@")[0], seed) for task, seed in listed[4:11]}
    assert len(starts) == 1  # the seven perturbations of one scene
    with pytest.raises(InputError, match="--eval-seed 7: demonstrations may have"):
        episodes.episode_list(env, rules._replace(eval_seed=7))
    suite = SimpleNamespace(perturbations=(), tasks=tuple("abcdefghij"))
    assert [task for task, _ in episodes.episode_list(suite, Rules(episodes=4))] == ["a", "c", "f", "h"]
    assert episodes.episode_list(suite, Rules(episodes=12))[9:] == [("j", 0), ("a", 1), ("b", 1)]


def test_rules_that_do_not_fit_are_one_line():
    args = SimpleNamespace(**Rules()._asdict())
    assert episodes.rules_of(args, 10) == Rules()
    with pytest.raises(InputError, match="--replan 5: a plan has 4 steps"):
        episodes.rules_of(args, 4)
    args.episodes = args.clean = 0
    with pytest.raises(InputError, match="nothing to evaluate"):
        episodes.rules_of(args, 10)
    with pytest.raises(InputError, match="2 cameras and 7 numbers an action; this policy has 3 and 14"):
        episodes.open_environments("tabletop", None, 64, 1, views=3, actions=14)


def test_nan_actions_are_failures_and_plans_are_made_together(env):
    rules, calls = Rules(replan=4), []

    def broken(observations, seeds, when):
        return np.full((len(observations), 10, 7), np.nan if when else 0.0), None

    played = episodes.rollout(broken, [env], [("lift_cube", 1)], rules)
    assert not played[0].success and "finite" in played[0].aborted and played[0].steps == rules.replan + 1
    assert episodes.summarise(played)["aborted"] == 1

    def still(observations, seeds, when):
        calls.append((tuple(seeds), when))
        return np.zeros((len(observations), 10, 7)), None

    listed = [("lift_cube", 50000), ("can_in_basket", 50001), ("lift_cube", 50002)]
    episodes.rollout(still, [env, make_environment("tabletop", size=64)], listed, rules)
    assert calls[0] == ((50000, 50001), 0) and len(calls) == 20 + 20  # 80 steps, four a plan


def test_the_policy_reads_what_the_rules_say(env):
    o = env.reset("lift_cube@camera:4", 0)
    same = episodes.degraded(o, env, Rules(), 0)
    assert all(np.array_equal(getattr(same, k), getattr(o, k)) for k in ("depth", "T_base_cam", "images"))
    worse = episodes.degraded(o, env, Rules(depth_noise=0.05, extrinsics="nominal", images="black"), 0)
    assert 0.04 < np.std(worse.depth / o.depth) < 0.06 and not np.allclose(worse.T_base_cam[0],
                                                                           o.T_base_cam[0])
    assert not worse.images.any() and o.images.any()
    assert np.array_equal(episodes.degraded(o, env, Rules(depth_noise=0.05), 0).depth, worse.depth)


def test_single_cells_are_paired_like_the_pool(tmp_path):
    outcomes = [("camera", True, 0.9), ("camera", False, 0.1), ("light", True, math.nan)]
    rows = [Episode(f"lift_cube@{kind}:1", k, kind, good, "", share, 5)
            for k, (kind, good, share) in enumerate(outcomes)]
    episodes.save_episodes(tmp_path / "by_scene.npz", rows)
    for metric, rate in (("success", 2 / 3), ("success_camera", 1 / 2), ("success_light", 1.0)):
        names, counts = read_counts(tmp_path, metric)
        assert len(names) == 3 and score(counts.sum(0), metric) == pytest.approx(rate)
    s = episodes.summarise(rows)
    assert s["episodes_visible_high"] == 1 and s["episodes_visible_mid"] == s["success_visible_low"] == 0


def test_summary_by_hand():
    def episode(category, success, share):
        return Episode("t", 0, category, success, "", share, 1)

    listed = [episode("", True, 1.0), episode("hard", False, 0.5), episode("layout", True, 0.1),
              episode("layout", False, 0.9)]
    listed += [episode(k, k == "camera", 1.0) for k
               in ("camera", "robot", "language", "light", "background", "noise")]
    s = episodes.summarise(listed)
    assert s["success"] == 2 / 8 and s["success_layout"] == 0.5
    assert s["success_clean"] == 1 and s["success_hard"] == 0
    assert s["success_weighted"] == pytest.approx((1599 + 0.5 * 1525) / 10030)
    assert s["success_visible_low"] == 1 and s["success_visible_mid"] == 0
    assert s["success_visible_high"] == pytest.approx(2 / 8)


def test_marks_are_drawn_where_they_are(env):
    o = env.reset("lift_cube", 0)
    masks = np.zeros((2, 1, 16, 16), bool)
    masks[0, 0, :8] = True
    points = np.full((2, 1, 2), np.nan)
    points[1, 0] = 0.5
    marks = episodes.Marks(np.array([3]), masks, np.full((2, 1, 2), np.nan), points)
    plain, drawn = episodes.paint(o, None)[22:], episodes.paint(o, marks)[22:]
    changed = (plain != drawn).any(-1)
    # the tint; no circle without a place
    assert changed[:150, :320].mean() > 0.9 and not changed[170:, :320].any()
    assert changed[150:170, 470:490].any() and changed[:, 320:].mean() < 0.01  # a cross
