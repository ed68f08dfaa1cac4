"""3DVLA's claims: arms name real settings, rivals differ where they say, an ablation shares what arms
share.
"""

import json
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from small_policy import SMALL, agent_of, train_batch

import experiments.threedvla as E
import threedvla as V
from common.robot import make_environment
from experiments.runner import Claim, main


pytestmark = pytest.mark.usefixtures("seeded")


def test_claims_name_real_settings_and_pay_the_same():
    names = {f.name for f in fields(V.Config)}
    for claim in E.CLAIMS.values():
        for arm in claim.arms.values():
            assert arm.keys() <= names | {"plug"} and arm.get("plug", "3dvla") in {*E.PLUGS, *E.TOLD}
            assert not arm.keys() & {"stage1_steps", "stage2_steps", "batch"}
    assert set(E.CLAIMS["main"].arms) == {"base", "control", "A", "B", "C"} and E.CLAIMS["main"].seeds == 5
    shown = {gate.metric for gate in E.CLAIMS["main"].gates}
    assert {"base:success_clean", "C:recall_1cm", "C:token_shift"} <= shown
    assert {*E.LATER, *E.BASE} <= names


@pytest.mark.parametrize("plug", [name for name in E.PLUGS if name != "3dvla"])
def test_every_rival_learns_in_both_stages(observations, plug):
    agent = agent_of(E.PLUGS[plug], variant="B").train()
    for stage in (1, 2):
        agent.set_stage(stage)
        known = plug in ("generic", "places", "points")
        terms = agent(train_batch(observations, agent.cfg, targets=stage == 1 and not known))
        sum(terms.values()).backward()
        assert all(x.isfinite() for x in terms.values()) and "action" in terms
        agent.three.move_teacher()
    tokens = agent.eval().prefix(V.observe(observations, SMALL))[0].front[0]
    # 12 probes are all there are here; a detector has an object and a destination in each view
    assert tokens.shape[1] == {"generic": 46, "places": 4, "points": 4}.get(plug, 42)


def test_the_control_has_c_s_size():
    rival, control = V.ThreeD(V.replace(SMALL, variant="C"), 32, 32), E.GenericTokens(SMALL, 32, 32)
    size = E.count(rival) - E.count(rival.teacher)
    assert size <= E.count(control) < 1.2 * size


def test_a_detection_is_a_place_or_the_same_place_lifted(observations):
    """Both arms read one heat map; the point is where the place meets the surface, wherever the camera is."""
    batch, plug = V.observe(observations, SMALL), E.PLUGS["points"](SMALL, 32, 32)
    heat = torch.full((3, 2, 2, 16, 16), -9.0)
    heat[..., 8, 5] = 9.0
    prefix = V.Prefix(None, None, None, heat=heat)
    found, other = plug.find(prefix, batch), E.PLUGS["places"](SMALL, 32, 32).find(prefix, batch)
    cells = V.cell_points(batch, (16, 16))[:, :, 8, 5]
    assert torch.allclose(found.place, torch.tensor([5.5 / 16, 8.5 / 16]).expand(3, 4, 2), atol=1e-3)
    assert torch.allclose(found.point[:, ::2], cells, atol=2e-3) and torch.equal(found.place, other.place)
    moved = batch.T_base_cam.clone()
    moved[:, 0, :3, 3] += 0.1
    away = plug.find(prefix, batch._replace(T_base_cam=moved))
    assert torch.equal(away.place, found.place) and (away.point - found.point)[:, :2].abs().max() > 0.05
    hand = batch.state[:, :3]
    assert not torch.allclose(plug.tokens(found, hand), plug.tokens(away, hand), atol=1e-4)


def test_told_offsets_do_not_depend_on_the_camera_unless_it_is_misread():
    env = E.as_played(E.ToldEnvironment(64))
    assert env.tasks == E.TASKS and env.perturbations.count("occluded") / len(env.perturbations) > 0.3

    def features(task: str, mode: str, nominal: bool = False) -> torch.Tensor:
        o = env.reset(task, 50007)
        T = env.nominal(o) if nominal else o.T_base_cam
        state, K, T = (torch.from_numpy(x)[None] for x in (o.state, o.K, T))
        return E.told(mode, ["can_in_basket"], state[:, :8], state[:, 8:].unflatten(1, (2, 4, 3)), K, T)

    plain, moved = "can_in_basket", "can_in_basket@camera:5"
    assert torch.allclose(features(plain, "told offsets"), features(moved, "told offsets"), atol=1e-4)
    assert not torch.allclose(features(plain, "told offsets"), features(moved, "told offsets", True), atol=0.1)
    assert not torch.allclose(features(plain, "told places"), features(moved, "told places"), atol=0.1)
    with_wrist, without = features(plain, "told places"), features(plain, "told agent places")
    assert with_wrist.shape[1] > without.shape[1]


def test_perception_is_perfect_on_true_points(observations):
    """recall, error and mask IoU from tokens that are the objects themselves."""
    agent = agent_of(variant="A")

    def find(prefix, batch):
        out = [V.Targets(*V.pseudo_targets(V.instance_masks(o), *(x[b].numpy() for x in batch[1:4]), cells=16))
               for b, o in enumerate(observations)]
        point, masks = (V.pad_sequence(x, True) for x in ([t.points for t in out], [t.masks for t in out]))
        valid = V.pad_sequence([torch.ones(len(t.points), dtype=torch.bool) for t in out], True)
        return V.Found(None, None, None, masks.transpose(1, 2) > 0.5, V.Probes(None, point, None, None, None),
                       None, valid, {})

    agent.three.find = find
    scores = E.perception(agent, observations)
    assert scores["recall_1cm"] == scores["recall_3cm"] == 1 and scores["token_error_m"] < 1e-6
    assert scores["mask_iou"] > 0.8  # an object smaller than half a cell has none


def test_rivals_differ_where_they_say(observations):
    three = V.ThreeD(SMALL, 32, 32)
    maps, points = torch.randn(1, 2, 32, 4, 4), torch.rand(1, 2, 4, 4, 3)
    other = torch.cat([maps[:, :1], torch.randn(1, 1, 32, 4, 4)], 1)
    unfused = E.changed(SMALL, 32, 32, name="without fusion").fusion
    assert torch.equal(unfused(maps, points)[:, 0], unfused(other, points)[:, 0])  # views do not mix
    absolute, hand = E.AbsoluteEncoding(48), torch.rand(1, 3)
    assert torch.equal(absolute(points[0, 0], hand), absolute(points[0, 0], hand + 1))
    assert sum(p.numel() for p in absolute.parameters()) == sum(p.numel() for p
                                                                in three.relative.parameters())
    assert E.MemoryTeacher(V.replace(SMALL, variant="B"), 32, 32).teacher is None


def test_2d_matching_is_by_view(observations):
    agent = agent_of(variant="A")
    batch = train_batch(observations, SMALL, targets=True)
    found = agent.three.find(agent.policy.encode(batch.images, batch.texts, agent.state(batch)), batch)
    m = E.match_2d(found.probes, batch.targets)
    seen = batch.targets.valid.sum((0, 1))  # objects a view sees, over the batch; each view has 12 probes
    assert (m.views.sum(1) == 1).all() and m.views.sum(0).tolist() == seen.tolist()
    nothing = batch.targets._replace(valid=torch.zeros_like(batch.targets.valid))
    assert len(E.match_2d(found.probes, nothing).b) == 0


@pytest.mark.parametrize("plug, variant", [("generic", "C"), ("3dvla", "A")])
def test_withheld_tokens_move_the_plan_as_far_as_they_are_read(observations, plug, variant):
    agent = agent_of(E.PLUGS[plug], variant=variant)
    if plug == "3dvla":
        torch.nn.init.constant_(agent.three.instances.heads.object.bias, 1.0)
    three, shift = agent.three, E.token_shift(agent, observations)
    assert agent.three is three and shift > 1e-4
    with torch.no_grad():
        agent.action_std.mul_(2)
    assert E.token_shift(agent, observations) == pytest.approx(shift, rel=1e-4)  # both plans double
    if plug == "3dvla":  # no object passes: nothing to withhold
        torch.nn.init.constant_(agent.three.instances.heads.object.bias, -9.0)
        assert E.token_shift(agent, observations) < 1e-4


def test_frames_to_score_the_predictor_on_are_no_demonstrations():
    frames, again = E.unseen_frames(64, 3), E.unseen_frames(64, 2)
    assert len(frames) == 3 and np.array_equal(frames[1].images, again[1].images)
    start = make_environment("tabletop", size=64).reset("can_in_basket", 50001)
    assert frames[1].instruction == start.instruction and not np.array_equal(frames[1].images, start.images)


def test_an_ablation_shares_bases_and_pairs_episodes(tmp_path, monkeypatch):
    from data.tabletop import make_world

    make_world(tmp_path / "w", seed=0, demos=1, tasks=("lift_cube",), size=64, workers=1)
    monkeypatch.setitem(V.PRESETS, "tiny", SMALL)
    monkeypatch.setattr("data.tabletop.GOAL_STEPS", 16)
    monkeypatch.setattr(E, "regression", lambda frames, *_: E.mlp(272, 4 * 7).requires_grad_(False))
    claim = Claim("mini", "a < b", {"A": {"variant": "A"}, "B": {"variant": "B"},
                                    "control": {"variant": "B", "plug": "generic"}}, (("B", "A"),),
                  metric="success")
    words = f"--claim mini --seeds 1 --out {tmp_path}/mini --data-root {tmp_path}/w --device cpu "
    words += "--base-steps 1 --stage1-steps 1 --stage2-steps 1 --episodes 7 --clean 1 --eval-batch 7 --replan 4"
    monkeypatch.setattr(sys, "argv", ["experiments/threedvla.py", *words.split()])
    verdict = main(E.__doc__, V.Config, V.PRESETS, {"mini": claim}, E.run_arm, flags=E.FLAGS, world=E.world,
                   steps=E.steps)
    comparison = verdict["comparisons"][0]
    assert comparison["scenes"] == 7 and comparison["seeds"] == [0]
    result = json.loads((tmp_path / "mini/B/seed0/result.json").read_text())
    wanted = {"success", "success_camera", "success_occluded", "success_clean", "success_told", "recall_1cm",
              "recall_2cm", "token_shift", "token_gradient", "random_success", "blind_success", "mask_iou"}
    assert wanted <= result["metrics"].keys() and result["cost"]["steps"] == 2
    pool = [p.name.split("-")[0] for p in (tmp_path / "arms").iterdir()]
    assert pool.count("base") == 1 and pool.count("stage1") == 2  # one base a seed; A and B share a stage 1
    assert [p.name for p in next((tmp_path / "arms").glob("base-*")).iterdir()] == ["seed0"]
