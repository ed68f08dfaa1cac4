"""3DVLA's equations by hand, by slow loops and by invariants; the hook on every policy; then its verbs on a
tiny world."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_policy import SMALL, agent_of, encode, look, sized, train_batch

import threedvla as V
from common import engine
from common.files import InputError
from common.geometry import invert, project, unproject
from common.networks.pointattn import completion_points, mirror_completion
from common.report import episodes
from common.robot import make_environment

run, fails = commands.of(V)


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def cameras() -> tuple[torch.Tensor, torch.Tensor]:
    """Two cameras over a table, one mirrored: K (1, 2, 3, 3), T_base_cam (1, 2, 4, 4)."""
    o = make_environment("tabletop", size=64).reset("lift_cube", 0)
    K = torch.from_numpy(o.K).float()
    K[1, 0, 0] *= -1
    return K[None], torch.from_numpy(o.T_base_cam).float()[None]


def find(agent: V.Agent, batch: V.Batch) -> V.Found:
    return agent.three.find(encode(agent, batch), batch)


# --- the hook -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, front", [("pi0", False), ("pi0", True), ("pi05", True), ("xvla", False)])
def test_no_tokens_change_no_bit_and_masked_ones_nothing(observations, policy, front):
    agent = agent_of(policy=policy, variant="base")
    batch, noise = V.observe(observations, SMALL), torch.randn(3, 4, 7)
    state, width = agent.state(batch), agent.policy.width
    with torch.no_grad():
        prefix = agent.prefix(batch)[0]
        alone = agent.policy.act(prefix, state, noise)
        none = V.plug(prefix, torch.zeros(3, 0, width), torch.zeros(3, 0), front)
        assert torch.equal(alone, agent.policy.act(none, state, noise))
        tokens = torch.randn(3, 5, width)
        hidden = agent.policy.act(V.plug(prefix, tokens, torch.zeros(3, 5), front), state, noise)
        assert torch.allclose(alone, hidden, atol=1e-5)
        plugged = V.plug(prefix, tokens, torch.ones(3, 5), front)
        shown = agent.policy.act(plugged, state, noise)
    assert not torch.allclose(alone, shown, atol=1e-4)
    assert torch.equal(plugged.tokens[:, : prefix.tokens.shape[1]], prefix.tokens)
    if front:  # the prefix's keys are its own, and enough
        kept = agent.policy.read(prefix)._replace(tokens=None, front=plugged.front)
        assert torch.equal(agent.policy.act(kept, state, noise), shown)
        assert torch.equal(agent.policy.read_all(kept)[0][:, :, :, : prefix.mask.shape[1]], kept.keys)


@pytest.mark.parametrize("policy, at, front", [("pi0", "end", False), ("pi0", "front", True),
                                               ("xvla", "front", False)])
def test_tokens_lie_where_the_flag_says(observations, policy, at, front):
    """--tokens-at front: before the prefix, except in X-VLA, whose slots are no distances."""
    agent = agent_of(policy=policy, variant="A", tokens_at=at)
    batch = V.observe(observations, SMALL)
    with torch.no_grad():
        plugged, alone = agent.prefix(batch)[0], encode(agent, batch).tokens
    assert (plugged.front is not None) == front
    assert plugged.tokens.shape[1] == alone.shape[1] + 12 * (not front)
    assert torch.equal(plugged.tokens[:, : alone.shape[1]], alone)


def test_tokens_of_each_variant(observations):
    batch, lengths = V.observe(observations, SMALL), []
    with torch.no_grad():
        for variant in ("base", "A", "B", "C"):
            agent = agent_of(variant=variant, tokens_at="end")
            lengths.append(agent.prefix(batch)[0].tokens.shape[1])
    assert [n - lengths[0] for n in lengths] == [0, 12, 12 + 30, 12 + 30]  # 12 probes are all there are here


# --- 3.1 ----------------------------------------------------------------------------------------------------


def test_token_points_are_unprojected_patch_centres():
    K, T = cameras()
    depth = torch.full((1, 2, 64, 64), 0.8)
    depth[0, 0, :16, :16] = 0.5
    depth[0, 0, :4, :4] = 0.0  # holes do not count
    points = V.token_points(depth, K, T, 4, 4)
    for v, i, j, z in ((0, 0, 0, 0.5), (0, 2, 1, 0.8), (1, 3, 3, 0.8)):
        expected = unproject(torch.tensor([16.0 * j + 8, 16.0 * i + 8]), torch.tensor(z), K[0, v], T[0, v])
        assert torch.allclose(points[0, v, i, j], expected, atol=1e-5)
    assert V.token_points(torch.zeros(1, 2, 64, 64), K, T, 4, 4).isfinite().all()


def test_position_embedding_is_equation_1():
    net, p = V.PositionEmbedding(8), torch.randn(5, 3)
    w1, b1, w2, b2 = net.mlp[0].weight, net.mlp[0].bias, net.mlp[2].weight, net.mlp[2].bias
    hidden = 0.5 * (p @ w1.T + b1) * (1 + torch.erf((p @ w1.T + b1) / math.sqrt(2)))
    out = hidden @ w2.T + b2
    expected = (out - out.mean(-1, keepdim=True)) / torch.sqrt(out.var(-1, correction=0, keepdim=True) + 1e-5)
    assert torch.allclose(net(p), expected, atol=1e-5)


def test_a_point_starts_at_its_masks_depth():
    """--start mask: the mean of the cells that the mask covers, without those that have no depth."""
    net, K_T = V.InstanceModule(V.replace(SMALL, start="mask")), cameras()
    depth = torch.full((1, 2, 64, 64), 0.8)
    depth[0, 0, 32:36, 24:28] = 0.0
    cells = V.cell_points(V.Batch(None, depth, *K_T, None, None), (16, 16))
    assert cells[0, 0, 8, 6].isnan().all()
    masks = torch.full((1, 2, 1, 16, 16), -9.0)
    masks[0, 0, 0, 8, 6:8] = 9.0
    net.heads.embed = lambda content, uv: torch.ones(1, 2, 1, 1)
    near = cells[:, 0, 8, 7][:, None] + 0.05
    point = net.mask_point(near, torch.zeros(1, 2, 1, 2), masks, cells, torch.zeros(1, 1, 48))
    assert torch.allclose(point[0, 0], cells[0, 0, 8, 7], atol=1e-4)
    corners, flat = cells[:, 0, [2, 12], [2, 12]], torch.zeros(1, 2, 2, 16, 16)
    net.heads.embed = lambda content, uv: torch.ones(1, 2, 2, 1)
    apart = net.mask_point(corners, torch.zeros(1, 2, 2, 2), flat[:, :, :1], cells, torch.zeros(1, 2, 48))
    assert (apart - corners).norm(dim=-1).max() < 0.1  # without masks each probe starts beside its own point


def test_fusion_mixes_views():
    K, T = cameras()
    maps, points = torch.randn(1, 2, 32, 4, 4), V.token_points(torch.full((1, 2, 64, 64), 0.8), K, T, 4, 4)
    other = maps.clone()
    other[:, 1] = torch.randn(1, 32, 4, 4)
    net = V.SpatialFusion(32, 48, 2, 1).eval()
    assert (net(maps, points)[:, 0] - net(other, points)[:, 0]).abs().max() > 1e-4


def test_patches_of_14_pixels_count_as_16(monkeypatch):
    cfg = V.replace(SMALL, sizes=sized(monkeypatch, image_size=56, patch=14, stem="patch"), variant="A")
    agent = V.Agent(cfg)
    agent.set_stage(1)
    batch = train_batch(look(56), cfg, targets=True)
    assert batch.targets.masks.shape[-1] == 16 and all(torch.isfinite(v) for v in agent(batch).values())


# --- 3.2 ----------------------------------------------------------------------------------------------------


def test_projection_is_geometrys_and_clamped_behind():
    K, T = cameras()
    points = torch.tensor([[[0.0, 0.05, 0.92], [0.1, -0.1, 1.0], [5.0, 0.0, 3.0]]])
    at, valid = V.project_probes(points, K, T, (64, 64))
    for v in range(2):
        uv, z = project(points[0], K[0, v], invert(T[0, v]))
        assert torch.allclose(at[0, v][valid[0, v]] * 64, uv[valid[0, v]], atol=1e-3)
        assert torch.equal(valid[0, v], (z > 1e-3) & (uv >= 0).all(-1) & (uv <= 64).all(-1))
    assert valid[0, 0, 0] and not valid[0, 0, 2] and at.isfinite().all()  # the last is behind the agent view


def test_view_gate_normalises_over_what_sees():
    net = V.ViewGate(8)
    sampled = torch.randn(1, 2, 3, 8)
    valid = torch.tensor([[[True, True, False], [True, False, False]]])
    weight, raw = net(sampled, valid).detach(), torch.sigmoid(net.mlp(sampled)[..., 0]).detach()
    assert torch.allclose(weight[0, :, 0], raw[0, :, 0] / raw[0, :, 0].sum(), atol=1e-4)
    # no view: zeros, not NaN
    assert weight[0, 0, 1] == pytest.approx(1, abs=1e-4) and (weight[0, :, 2] == 0).all()


def test_refinement_is_bounded_by_alpha():
    points, step = torch.randn(2, 5, 3), 100 * torch.randn(2, 5, 3)
    moved = (V.move_points(points, step) - points).abs()
    assert moved.max() <= 0.1 + 1e-6 and moved.max() > 0.09
    assert torch.equal(V.move_points(points, torch.zeros_like(step)), points)


def test_probes_start_where_they_are_learned_and_no_view_is_survived(observations):
    agent, batch = agent_of(variant="A", start="probe"), V.observe(observations, SMALL)
    with torch.no_grad():
        found = agent.prefix(batch)[1]
        start = agent.three.instances.point[found.index]  # the last layer starts at zero
        assert torch.equal(found.probes.point, start)
        away = batch._replace(T_base_cam=batch.T_base_cam.clone())
        away.T_base_cam[..., :3, 3] += 50.0  # nothing is in any picture
        prefix, blind = agent.prefix(away)
    assert not V.project_probes(blind.probes.point, away.K, away.T_base_cam, (64, 64))[1].any()
    assert all(x.isfinite().all() for x in blind.probes) and prefix.tokens.isfinite().all()


def test_views_may_come_in_any_order(observations):
    agent = agent_of(variant="A")
    torch.nn.init.normal_(agent.three.instances.layers[0].coordinate[-1].weight, std=0.2)
    batch = V.observe(observations, SMALL)
    turned = batch._replace(**{k: getattr(batch, k).flip(1) for k in ("images", "depth", "K", "T_base_cam")})
    with torch.no_grad():
        a, b = (find(agent, x) for x in (batch, turned))
    for name in ("content", "point", "logit"):
        assert torch.allclose(getattr(a.probes, name), getattr(b.probes, name), atol=1e-4), name
    assert torch.allclose(a.probes.boxes, b.probes.boxes.flip(1), atol=1e-4)
    memory = b.memory.unflatten(1, (2, -1)).flip(1).flatten(1, 2)
    assert torch.allclose(a.memory, memory, atol=1e-4)


def probes_and_targets(Q: int = 6, T: int = 3) -> tuple[V.Probes, V.Targets]:
    boxes = torch.cat([0.2 + 0.6 * torch.rand(1, 2, Q, 2), 0.1 + 0.1 * torch.rand(1, 2, Q, 2)], -1)
    probes = V.Probes(torch.randn(1, Q, 8), torch.rand(1, Q, 3), torch.randn(1, Q), boxes,
                      torch.randn(1, 2, Q, 4))
    target = torch.cat([0.2 + 0.6 * torch.rand(1, T, 2, 2), 0.1 + 0.1 * torch.rand(1, T, 2, 2)], -1)
    valid = torch.tensor([[[True, True], [True, False], [False, True]]])[:, :T]
    return probes, V.Targets(torch.rand(1, T, 3), target, (torch.rand(1, T, 2, 5, 5) > 0.5).float(), valid)


def test_costs_by_hand():
    probes, targets = probes_and_targets()
    cost, (v, q, t) = V.match_costs(probes, targets), (1, 4, 2)
    p = torch.sigmoid(probes.logit[0, q])
    cls = 0.25 * (1 - p) ** 2 * -torch.log(p) - 0.75 * p**2 * -torch.log(1 - p)
    a, b = probes.boxes[0, v, q], targets.boxes[0, t, v]
    (a0, a1), (b0, b1) = ((x[:2] - x[2:] / 2, x[:2] + x[2:] / 2) for x in (a, b))
    inter = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp_min(0).prod()
    union = a[2:].prod() + b[2:].prod() - inter
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod()
    apart = (probes.point[0, q] - targets.points[0, t]).abs().sum()
    expected = 2 * cls + 5 * (a - b).abs().sum() - 2 * (inter / union - (hull - union) / hull) + 10 * apart
    assert torch.allclose(cost[0, v, q, t], expected, atol=1e-4)


def test_one_matching_for_all_views_is_the_best_one():
    probes, targets = probes_and_targets()
    m, cost = V.match(probes, targets), V.match_costs(probes, targets)[0]
    # averaged over valid views only
    mean = torch.stack([cost[:, :, 0].mean(0), cost[0, :, 1], cost[1, :, 2]], -1)
    best = min(itertools.permutations(range(6), 3),
               key=lambda p: float(sum(mean[q, t] for t, q in enumerate(p))))
    assert {(int(q), int(t)) for q, t in zip(m.q, m.t)} == {(q, t) for t, q in enumerate(best)}
    assert torch.equal(m.views, targets.valid[0, m.t])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    shuffled = V.Probes(*(x[:, order] for x in probes[:3]), *(x[:, :, order] for x in probes[3:]))
    again = V.match(shuffled, targets)
    assert {(int(order[q]), int(t)) for q, t in zip(again.q, again.t)} == {(int(q), int(t)) for q, t
                                                                           in zip(m.q, m.t)}


def test_instance_loss_falls_to_its_floor_on_perfect_probes():
    probes, targets = probes_and_targets(Q=3)
    mask_map = torch.zeros(1, 2, 4, 5, 5)
    noisy, _ = V.instance_loss([probes], mask_map, targets)
    # every probe an object, embeddings that pick a channel, channels that are the true masks
    for t in range(3):
        mask_map[0, :, t] = 40 * (targets.masks[0, t] - 0.5)
    embed = torch.eye(4)[:3].expand(1, 2, 3, 4)
    boxes = targets.boxes.transpose(1, 2)
    perfect = V.Probes(probes.content, targets.points, torch.full((1, 3), 12.0), boxes, embed)
    terms, m = V.instance_loss([perfect], mask_map, targets)
    assert set(terms) == {"cls", "l1", "giou", "ce", "dice", "p3d"} and torch.equal(m.q, m.t)
    assert all(float(terms[k]) < 1e-3 for k in ("cls", "l1", "giou", "ce",
                                                "p3d")) and float(terms["dice"]) < 0.3
    assert all(float(noisy[k]) > float(terms[k]) for k in terms)
    apart = [sum((probes.point[0, q] - targets.points[0, t]).abs().sum() for t, q in enumerate(o))
             for o in itertools.permutations(range(3))]
    assert terms["p3d"] == 0 and noisy["p3d"] == pytest.approx(10 * min(apart) / 3, rel=0.5)


def test_no_objects_is_no_error():
    probes, targets = probes_and_targets()
    for nothing in (targets._replace(valid=torch.zeros_like(targets.valid)),
                    V.Targets(*(x[:, :0] for x in targets))):
        terms, m = V.instance_loss([probes], torch.randn(1, 2, 4, 5, 5), nothing)
        assert len(m.b) == 0 and all(x.isfinite() for x in terms.values()) and terms["l1"] == 0


def test_objects_are_chosen_by_score_and_matches_first():
    probes, _ = probes_and_targets()
    probes = probes._replace(logit=torch.tensor([[3.0, -3.0, 0.0, 2.0, -1.0, -2.0]]))
    index, valid = V.choose_objects(probes)
    assert index.tolist() == [[0, 3, 2, 4, 5, 1]] and valid.tolist() == [[True] * 3 + [False] * 3]
    zero, one = torch.tensor([0]), torch.tensor([1])
    index, valid = V.choose_objects(probes, V.Matches(zero, one, zero, torch.ones(1, 2).bool()))
    assert index[0, 0] == 1 and valid[0].tolist() == [True] * 4 + [False] * 2


def test_pseudo_ground_truth_is_right_and_forgets_identities(observations):
    o, b = observations[0], V.observe(observations[:1], SMALL)
    env = make_environment("tabletop", size=64)
    env.reset("can_in_basket", 5)
    scene = [x[0].numpy() for x in (b.depth, b.K, b.T_base_cam)]
    renamed = o._replace(instances=np.where(o.instances > 0, 40 - o.instances, 0))
    found, again = (V.Targets(*V.pseudo_targets(V.instance_masks(x), *scene, cells=16)) for x in (o, renamed))
    assert len(found.points) == len(again.points) >= 3 and found.valid.any(1).all()
    points = [x.points.numpy()[np.lexsort(x.points.numpy().T)] for x in (found, again)]
    assert np.allclose(*points)
    can = env.world.thing("green can")
    apart = np.linalg.norm(found.points.numpy() - (can.position + [0, 0, 0.9 + 0.045]), axis=1)
    t = int(apart.argmin())
    assert apart.min() < 0.05
    uv, _ = project(found.points[t].double(), torch.from_numpy(o.K[0]),
                    torch.from_numpy(np.linalg.inv(o.T_base_cam[0])))
    inside = ((uv / 64 - found.boxes[t, 0, :2]).abs() < found.boxes[t, 0, 2:] / 2 + 0.03).all()
    assert found.valid[t, 0] and inside and 0.5 < found.masks[t, 0].max() <= 1


def test_a_thing_in_both_views_is_one_object():
    K, T = (x[0].numpy() for x in cameras())
    depth, masks = np.zeros((2, 64, 64), np.float32), [[], []]
    thing = torch.tensor([-0.12, 0.0, 0.95])
    for v in range(2):
        uv, z = project(thing, torch.from_numpy(K[v]), torch.from_numpy(np.linalg.inv(T[v])).float())
        mask, (x, y) = np.zeros((64, 64), bool), (int(c) for c in uv)
        mask[max(y - 3, 0) : y + 3, max(x - 3, 0) : x + 3] = True
        depth[v][mask] = float(z)
        masks[v] = [mask]
    found = V.Targets(*V.pseudo_targets(masks, depth, K, T, 16))
    assert found.valid.tolist() == [[True, True]] and (found.points[0] - thing).norm() < 0.03
    assert len(V.pseudo_targets(masks, depth, K, T, 16, radius=1e-6)[0]) == 2


# --- 3.3 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_masking_is_asymmetric_exact_and_in_blocks(ratio):
    hidden = V.asymmetric_mask(16, 2, 8, 8, ratio, torch.Generator().manual_seed(0))
    assert (hidden.sum((1, 2, 3)) == round(128 * ratio)).all()
    heavy = hidden.float().mean((2, 3)).amax(1)
    assert torch.allclose(heavy, torch.tensor(round(min(2 * ratio, 0.8) * 64) / 64))
    joined = (hidden[..., 1:] == hidden[..., :-1]).float().mean()
    scattered = torch.rand(16, 2, 8, 8) < hidden.float().mean()
    assert joined > (scattered[..., 1:] == scattered[..., :-1]).float().mean() + 0.15  # blocks, not noise
    assert not torch.equal(hidden[0], hidden[1])


def test_rope_ignores_a_common_shift_and_sees_centimetres_only_when_scaled():
    net = V.Attention(48, 2)
    x, y, px, py = torch.randn(1, 4, 48), torch.randn(1, 6, 48), torch.randn(1, 4, 3), torch.randn(1, 6, 3)
    shift = torch.tensor([0.7, -0.3, 0.2])

    def out(y, px, py, keep=None):
        return net(x, y, keep, V.rotary(px, py, 20.0))

    assert torch.allclose(out(y, px, py), out(y, px + shift, py + shift), atol=1e-5)
    assert not torch.allclose(out(y, px, py), out(y, px + shift, py), atol=1e-3)
    keep, other = torch.tensor([[True, True, False, True, True, True]]), y.clone()
    other[0, 2] += 1
    assert torch.equal(out(y, px, py, keep), out(other, px, py, keep))  # masked keys are not there
    q, moved, still = torch.randn(1, 1, 1, 48), torch.tensor([[[0.05, 0, 0]]]), torch.zeros(1, 1, 3)
    # metres: 5 cm turn a vector by almost nothing
    turned = [V.rotary(moved, still, s)(q, q) for s in (1.0, 20.0)]
    cosine = [float(F.cosine_similarity(*pair, dim=-1)) for pair in turned]
    assert cosine[0] > 0.999 > cosine[1] > 0.5


def test_hidden_tokens_leak_nothing_to_the_student(observations):
    agent, batch = agent_of(variant="B"), V.observe(observations, SMALL)
    with torch.no_grad():
        found = find(agent, batch)
        hidden = V.asymmetric_mask(3, 2, 4, 4, 0.5, torch.Generator().manual_seed(1))
        noise = torch.randn_like(found.memory)
        other = found._replace(memory=torch.where(hidden.flatten(1)[..., None], noise, found.memory))
        predicted, true, index = agent.three.predict_hidden(found, hidden)
        predicted2, true2, _ = agent.three.predict_hidden(other, hidden)
    assert predicted.shape == (3, 16, 48) and torch.equal(predicted, predicted2) and not torch.allclose(true,
                                                                                                        true2)
    assert hidden.flatten(1).gather(1, index).all()
    assert torch.allclose(true.mean(-1), torch.zeros(3, 16), atol=1e-5)  # layer norm without affine


def test_self_supervised_terms_by_hand():
    predicted, true = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    assert V.direction_term(predicted, true) == pytest.approx(((1 - 1 / math.sqrt(2)) + 2) / 2, abs=1e-6)
    terms = V.ssl_loss(predicted, true)
    assert terms["recon"] == pytest.approx((0 + 0.5 + 0 + (3 - 0.5)) / 4)
    assert terms["cos"] == V.direction_term(predicted, true)
    std = [math.sqrt(0.25 + 1e-4), math.sqrt(1 + 1e-4)], [math.sqrt(0.25 + 1e-4), math.sqrt(1 + 1e-4)]
    assert terms["var"] == pytest.approx(10 * sum(max(0, t - s) for s, t in zip(*std)) / 2)
    collapsed, spread = torch.ones(50, 4), torch.randn(50, 4)
    assert V.variance_term(collapsed, spread) > 0.5 and V.variance_term(spread, spread) == 0


def test_the_teacher_is_an_average_of_the_student():
    agent = agent_of(variant="C")
    three = agent.three
    before = [p.clone() for p in three.teacher.parameters()]
    with torch.no_grad():
        for p in three.context.parameters():
            p.add_(1.0)
    three.move_teacher()
    for old, new, student in zip(before, three.teacher.parameters(), three.context.parameters()):
        assert torch.allclose(new, 0.98 * old + 0.02 * student, atol=1e-6)
    assert 0.98 ** V.PRESETS["tiny"].stage2_steps < 0.01 and V.PRESETS["paper"].ema == 0.999
    agent.set_stage(2)
    assert not any(p.requires_grad for p in three.teacher.parameters())


def test_completion_pipeline_takes_six_objects_least_certain_first():
    cells = np.stack(np.meshgrid(np.linspace(-0.3, 0.3, 32), np.linspace(-0.3, 0.3, 32), indexing="ij"), -1)
    points = np.concatenate([cells, np.full((32, 32, 1), 0.9)], -1)[None]
    masks, valid, eye = np.zeros((1, 10, 32, 32), bool), np.ones(10, bool), np.array([[0, 0, 2.0]])
    for n in range(10):
        masks[0, n, 3 * n : 3 * n + 3, 4:12] = True
    valid[9] = False
    comp, there = completion_points(masks, valid, np.arange(9, -1, -1), points, eye, mirror_completion, 32, 6, 5)
    assert comp.shape == (30, 3) and there.all()
    rows = [int(np.abs(cells[:, 0, 0] - comp[5 * k : 5 * k + 5, 0].mean()).argmin()) // 3 for k in range(6)]
    assert rows == [8, 7, 6, 5, 4, 3]  # 9 is not valid
    masks[0, :, :, 5:] = masks[0, :, :3] = False  # two cells, then none, of most; the first has three
    masks[0, 0] = False
    masks[0, 0, 10, 4:7] = True
    comp, there = completion_points(masks, valid, np.arange(10), points, eye, mirror_completion, 32, 6, 5)
    assert there[:5].all()  # a small object is completed too
    comp, there = completion_points(masks & False, valid, np.arange(10), points, eye, mirror_completion, 32, 6, 5)
    assert not there.any()


def test_completion_stays_above_the_table_and_near():
    """A mirrored cloud reaches through the table, and a stray cell far away: neither is chosen."""
    side = np.linspace(-0.3, 0.3, 32)
    points = np.stack([*np.meshgrid(side, side, indexing="ij"), np.full((32, 32), 0.9)], -1)[None]
    masks = np.zeros((1, 1, 32, 32), bool)
    masks[0, 0, 14:18, 14:18] = True
    points[0, 14:18, 14:18, 2] += np.linspace(0.0, 0.05, 16).reshape(4, 4)
    complete = lambda cloud, eye: np.concatenate([cloud, cloud - [0, 0, 0.06], cloud + [0.4, 0, 0]])  # noqa: E731
    comp, there = completion_points(masks, np.ones(1, bool), np.arange(1), points, np.array([[1.0, 0, 2]]),
                                    complete, 32, 6, 5)
    assert there[:5].all() and comp[:5, 2].min() > 0.89 and np.abs(comp[:5, :2]).max() < 0.1


def test_completion_reads_masks_where_the_probe_is_seen(observations, monkeypatch):
    agent, inputs, none = agent_of(variant="B", start="probe"), [], (np.zeros((30, 3)), np.zeros(30, bool))
    monkeypatch.setattr(V.pointattn, "completion_points", lambda masks, *rest: (inputs.append(masks), none)[1])
    monkeypatch.setattr(V, "view_masks", lambda embed, cells: torch.ones(*embed.shape[:3], *cells.shape[-2:]))
    batch = V.observe(observations, SMALL)
    found = find(agent, batch)  # completes
    wanted = V.project_probes(found.probes.point, batch.K, batch.T_base_cam, (64, 64))[1]  # (B, V, T)
    assert np.array_equal(np.stack(inputs).any((-1, -2)), wanted.numpy()) and 0 < wanted.float().mean() < 1


def test_no_view_is_learned_at_hidden_tokens(observations):
    """Completion points are asked for without a view: the self-supervised loss must reach that embedding
    too."""
    agent = agent_of(variant="B")
    agent.set_stage(2)
    terms = agent(train_batch(observations, agent.cfg))
    sum(terms[name] for name in ("recon", "cos", "var")).backward()
    assert (agent.three.predictor.place.views.weight.grad.abs().sum(1) > 0).all()


# --- 3.4 ----------------------------------------------------------------------------------------------------


def test_encoding_is_relative_to_the_hand():
    net = V.RelativeEncoding(48)
    points, hand, shift = torch.rand(2, 4, 3), torch.rand(2, 3), torch.tensor([0.3, -0.1, 0.2])
    assert torch.allclose(net(points, hand), net(points + shift, hand + shift), atol=1e-4)
    assert not torch.allclose(net(points, hand), net(points, hand + shift), atol=1e-4)


def test_local_context_is_a_slow_loop():
    net = V.LocalContext(8, neighbours=2)
    c, p, f, q = torch.randn(1, 3, 8), 0.1 * torch.rand(1, 3, 3), torch.randn(1, 4, 8), 0.1 * torch.rand(1, 4,
                                                                                                         3)
    p[0, 2] += 5.0  # far from everything
    valid = torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        out = net(c, p, f, q, valid)
        for i in range(2):
            near = sorted(range(3), key=lambda j: float((p[0, i] - q[0, j]).norm()))[:2]
            score = torch.stack([net.q(c[0, i]) @ net.k(f[0, j]) / math.sqrt(8)
                                 + net.bias(q[0, j] - p[0, i])[0] for j in near])
            expected = (score.softmax(0)[:, None] * net.v(f[0, near])).sum(0)
            assert torch.allclose(out[0, i], expected, atol=1e-5)
    assert (out[0, 2] == 0).all()


def test_routing_starts_almost_as_the_identity():
    net = V.RoutingGate(48)
    c, h = torch.randn(2, 4, 48), torch.randn(2, 4, 48)
    assert torch.allclose(net(c, h, torch.zeros(2, 4)), c + 0.04742587 * F.layer_norm(h, (48,)), atol=1e-6)
    assert torch.equal(net(c, torch.zeros_like(h), torch.zeros(2, 4)), c)  # no context: untouched


# --- stages -------------------------------------------------------------------------------------------------


def test_each_stage_freezes_what_the_paper_freezes():
    agent = agent_of(variant="C")

    def learns(*modules) -> set[bool]:
        return {p.requires_grad for module in modules for p in module.parameters()}

    three, policy = agent.three, agent.policy
    agent.set_stage(0)
    assert learns(policy.vlm(), agent.ground) == {True} and learns(three) == {False}
    agent.set_stage(1)
    assert learns(policy.vlm(), agent.ground) == {False}
    assert learns(three.fusion, three.instances, three.relative, policy.net.model.dit) == {True}
    agent.set_stage(2)
    assert learns(policy.vlm(), agent.ground, three.fusion, three.instances) == {False}
    assert learns(three.predictor, three.context, three.local, three.routing, three.relative) == {True}
    assert learns(policy.net.action_out_proj) == {True}


def test_metres_do_not_decay_and_probes_start_at_the_objects(tabletop):
    """Points of the first stage lie around the objects, on a floor too; the expert learns by AdamW."""
    frames, agent = V.Frames(SMALL, tabletop), V.Agent(V.replace(SMALL, variant="A"))
    low = torch.tensor([0.2, 0.2, 0.0])  # LIBERO's floor scenes
    frames.targets = lambda i: V.Targets(low + 0.1 * torch.rand(4, 3), None, None, None)
    optimizer = V.prepare(agent, 1, torch.device("cpu"), frames)
    point, groups = agent.three.instances.point, optimizer.param_groups
    assert (point >= low - 0.06).all() and (point <= low + 0.16).all()
    of = {id(p): group for group in groups for p in group["params"]}
    assert of[id(point)]["weight_decay"] == 0 < of[id(agent.three.instances.content)]["weight_decay"]
    assert not of[id(agent.policy.net.model.dit.layers[0].mlp.up_proj.weight)]["orthogonal"]
    assert of[id(agent.three.fusion.layers[0].ffn[0].weight)]["orthogonal"]


def test_what_is_frozen_is_computed_once_and_learns_alike(tabletop, tmp_path, monkeypatch):
    frames, agent = V.Frames(SMALL, tabletop), agent_of(variant="C")
    torch.nn.init.constant_(agent.three.instances.heads.object.bias, 1.0)
    agent.set_stage(2)
    fresh = frames.batch([3, 7], agent)
    frames.freeze(agent, tmp_path / "base", tmp_path / "stage1")
    kept, drawn = frames.batch([3, 7], agent), V.draw_step(SMALL, 2, 0, 0)
    assert fresh.images is not None and kept.images is None and kept.prefix.tokens is None
    with torch.no_grad():
        a, b = (agent(batch._replace(**drawn)) for batch in (fresh, kept))
    assert all(torch.allclose(a[k], b[k], rtol=0.02) for k in a)
    names = {p.name.split("-")[0] for p in tmp_path.glob("*/*-*")}
    assert names == {"tokens", "found"}
    agent.cfg = V.replace(agent.cfg, head_batch=4)  # no larger than --batch: completion points alone
    frames.freeze(agent, tmp_path / "base", tmp_path / "alone")
    points = frames.batch([3, 7], agent)
    assert [p.name[:5] for p in (tmp_path / "alone").iterdir()] == ["comp-"] and points.prefix is None
    with torch.no_grad():
        assert torch.allclose(points.comp[0], agent.three.find(agent.encode(fresh), fresh).comp[0])
    agent.cfg = SMALL
    monkeypatch.setattr(V.Agent, "encode", lambda self, batch: 1 / 0)  # never called for what is there
    again = V.Frames(SMALL, tabletop)
    with pytest.raises(ZeroDivisionError):
        torch.nn.init.normal_(agent.policy.vlm().get_input_embeddings().weight)  # other weights: another cache
        again.freeze(agent, tmp_path / "base", tmp_path / "stage1")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_moves_what_learns_and_nothing_else(observations, stage):
    agent = agent_of(variant="C").train()
    agent.set_stage(stage)
    torch.nn.init.constant_(agent.three.instances.heads.object.bias, 1.0)  # every probe is an object
    before = {n: p.clone() for n, p in agent.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in agent.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    for step in range(2):  # zero-initialised layers pass gradient from the second step on
        terms = agent(train_batch(observations, agent.cfg, step, targets=stage == 1))
        optimizer.zero_grad(), sum(terms.values()).backward(), optimizer.step()
    moved = {n for n, p in agent.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= {n for n, p in agent.named_parameters() if p.requires_grad}
    parts = {1: ("three.fusion", "three.instances", "three.relative", "policy.net.model.dit"),
             2: ("three.predictor", "three.context", "three.routing", "three.out_comp",
                 "policy.net.model.dit")}[stage]
    for part in parts:
        assert any(n.startswith(part) for n in moved), part
    assert set(terms) == {"action", *(V.WEIGHTS if stage == 1 else ("recon", "cos", "var"))}


def test_two_processes_draw_what_one_would():
    whole = V.draw_step(SMALL, 4, 3, 5)
    parts = [V.draw_step(SMALL, 2, 3, 5, rank, 2) for rank in range(2)]
    assert all(torch.equal(whole[k], torch.cat([part[k] for part in parts])) for k in whole)
    V.draw_step(SMALL, 1, 20261129, 5)  # a date is a seed


@pytest.mark.parametrize("changes, words", [
    (dict(heads=5), "--heads 5"), (dict(heads=16), "at least 6 channels"), (dict(batch=0), "--batch 0"),
    (dict(ema=1.0), "--ema 1.0"), (dict(policy="xvla", vlm="x"), "only pi0's weights"),
    (dict(probes=-3), "--probes -3"), (dict(lr=math.nan), "--lr nan"),
    (dict(mask_ratio=1.0), "--mask-ratio 1.0"), (dict(sample_heads=5), "--sample-heads 5")])
def test_sizes_that_do_not_fit_are_one_line(changes, words):
    with pytest.raises(InputError, match=words):
        V.check(V.replace(SMALL, **changes))
    for fits in (SMALL, *V.PRESETS.values()):
        V.check(fits)


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["A", "C"])
def test_the_simulators_masks_are_never_read(observations, variant):
    agent, rng = agent_of(variant=variant), np.random.default_rng(0)
    torch.nn.init.constant_(agent.three.instances.heads.object.bias, 1.0)
    poisoned = [o._replace(instances=rng.integers(0, 9, o.instances.shape)) for o in observations]
    blank = [o._replace(instances=None) for o in observations]
    clean, bad, none = (V.predict(agent, x, [1, 2, 3], 0)[0] for x in (observations, poisoned, blank))
    assert np.array_equal(clean, bad) and np.array_equal(clean, none)


def test_noise_of_an_episode_does_not_depend_on_its_company(observations):
    agent = agent_of(variant="base")
    together = V.predict(agent, observations, [7, 8, 9], 2)[0]
    alone = V.predict(agent, observations[1:2], [8], 2)[0]
    assert np.allclose(together[1], alone[0], atol=1e-5)
    assert not np.allclose(alone, V.predict(agent, observations[1:2], [9], 2)[0])


def test_marks_are_the_chosen_objects(observations):
    agent = agent_of(variant="C")
    torch.nn.init.constant_(agent.three.instances.heads.object.bias, 1.0)
    marks = V.predict(agent, observations, [7, 8, 9], 0)[1](1)
    assert marks.masks.shape == (2, 12, 16, 16) and marks.objects.shape == (2, 12, 2) and len(marks.ids) == 12
    assert np.isfinite(marks.objects).any() and marks.points.shape[2] == 2
    assert episodes.paint(observations[1], marks).shape == (342, 640, 3)


# --- the verbs ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The tiny preset shrinks, and episodes end after 16 steps a goal."""
    monkeypatch.setitem(V.PRESETS, "tiny", SMALL)
    monkeypatch.setattr("data.tabletop.GOAL_STEPS", 16)


def test_a_policy_learns_one_demonstration(tabletop):
    """X-VLA's form on one demonstration: the error halves within some seconds."""
    cfg = V.replace(SMALL, policy="xvla", variant="base", w_ground=0.0)
    frames, agent = V.Frames(cfg, tabletop), V.Agent(cfg)
    for name, value in frames.demos.statistics().items():
        getattr(agent, name)[: len(value)] = value
    agent.set_stage(0)
    optimizer, losses = torch.optim.AdamW(agent.parameters(), 3e-3), []
    for step in range(50):
        loss = agent(frames.batch(list(range(0, 16, 2)),
                                  agent)._replace(**V.draw_step(cfg, 8, 0, step)))["action"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_train_and_eval_from_the_command_line(small, tabletop, tmp_path, capsys):
    out = tmp_path / "run"
    train = "train", "--data-root", tabletop, "--device", "cpu"
    run(*train, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["stage0", "stage1", "stage2"]
    run(*train, "--out", out)  # nothing left to do
    assert capsys.readouterr().out.count("finished, 2 steps") == 3
    run("eval", "--ckpt", out, "--episodes", "7", "--clean", "1", "--eval-batch", "3", "--pictures", "1",
        "--device", "cpu", "--depth-noise", "0.01", "--replan", "4")
    result = json.loads((out / "stage2" / "result.json").read_text())
    assert result["dataset"]["name"] == "synthetic tabletop world" and result["dataset"]["frames"] == 9
    assert {"success", "success_clean", "success_hard", "random_success", "expert_success", "blind_success",
            "success_camera_nominal", "success_depth_noise_2", "success_weighted", "replan_ms", "aborted",
            "token_shift", "ssl_predictor", "ssl_position", "ssl_nearest"} <= result["metrics"].keys()
    assert result["cost"]["steps"] == 4 and len(list((out / "stage2" / "pictures").glob("*.gif"))) == 1
    with np.load(out / "stage2" / "by_scene.npz") as rows:
        assert len(rows["success"]) == 7 and rows["trials"].sum() == 7
    printed = capsys.readouterr().out
    assert "===> success_weighted" in printed and "depth: simulator, noise 0.01" in printed
    # another variant on the same base policy: stage 0 is not trained again
    run(*train, "--variant", "base", "--base", out, "--out", tmp_path / "bare")
    assert sorted(p.name for p in (tmp_path / "bare").iterdir()) == ["stage1", "stage2"]


def test_the_completion_network_is_a_stage_of_its_own(small, tabletop, tmp_path, monkeypatch):
    session = engine.Session
    monkeypatch.setattr(V.pointattn, "Session", lambda *a, steps, **k: session(*a, steps=2, **k))
    out, words = tmp_path / "run", ("--completion", "pointattn", "--device", "cpu")
    run("train", "--data-root", tabletop, "--out", out, *words)
    assert sorted(p.name for p in out.iterdir()) == ["completion", "stage0", "stage1", "stage2"]
    learned = V.pointattn.PointAttN(32)
    V.load_checkpoint(out / "completion", learned)
    agent = V.load_agent(V.replace(SMALL, completion="pointattn"), SimpleNamespace(ckpt=out, device="cpu"))[0]
    assert all(torch.equal(a, b) for a, b in zip(learned.parameters(), agent.three.completer.parameters()))
    shutil.copytree(tabletop, tmp_path / "w")
    world = json.loads((tmp_path / "w" / "world.json").read_text())
    (tmp_path / "w" / "world.json").write_text(json.dumps(world
                                                          | {"roles": {t: [[], []] for t in world["tasks"]}}))
    with pytest.raises(SystemExit):  # these shapes are not known
        run("train", "--data-root", tmp_path / "w", "--out", tmp_path / "x", *words)


def test_killed_stages_go_on_bit_equal(small, tabletop, tmp_path, monkeypatch):
    steps = {name: 3 for name in ("base_steps", "stage1_steps", "stage2_steps")}
    monkeypatch.setitem(V.PRESETS, "tiny", V.replace(SMALL, **steps))
    plain, dies_in = engine.parts.save_checkpoint, []

    def save(folder, *rest):
        plain(folder, *rest)
        if folder.name in dies_in and rest[3] == 2:
            raise KeyboardInterrupt

    def train(name: str) -> list[bytes]:
        run("train", "--data-root", tabletop, "--out", tmp_path / name, "--device", "cpu")
        stages = (tmp_path / name / f"stage{k}/step_000003/model.safetensors" for k in range(3))
        return [path.read_bytes() for path in stages]

    monkeypatch.setattr(engine.parts, "save_checkpoint", save)
    whole = train("whole")
    for stage in ("stage0", "stage1", "stage2"):
        dies_in[:] = [stage]
        with pytest.raises(KeyboardInterrupt):
            train("killed")
        dies_in.clear()
    assert train("killed") == whole


def test_resume_begins_what_is_not_begun(small, tabletop, tmp_path, capsys):
    out = tmp_path / "run"
    words = "train", "--data-root", tabletop, "--device", "cpu", "--out", out
    assert "drop --resume" in fails(capsys, *words, "--resume")
    run(*words)
    for stage in ("stage1", "stage2"):
        shutil.rmtree(out / stage)
    run(*words, "--resume")
    assert (out / "stage2" / "latest.json").is_file()


def test_another_base_policy_is_refused(small, tabletop, tmp_path):
    run("train", "--data-root", tabletop, "--out", tmp_path / "run", "--device", "cpu", "--steps", "1")
    base = tmp_path / "run" / "stage0"
    for other in (dict(sizes="tiny"), dict(w_ground=0.0), dict(policy="pi05"), dict(head="l1")):
        with pytest.raises(InputError, match=f"another base policy .*{next(iter(other))}"):
            V.inherit(agent_of(**other), base, 0)
    agent = agent_of(probes=8)
    V.inherit(agent, base, 0)
    size = agent.policy.word_size()
    # new tokens start at the words' size
    assert float(agent.three.out_inst.gain) == pytest.approx(size) != 0.5
    with pytest.raises(InputError, match="is .* there, .* here"):
        V.inherit(agent_of(probes=8), tmp_path / "run" / "stage1", 1)
    with pytest.raises(InputError, match="not a stage 0"):
        V.inherit(agent_of(), tmp_path / "run" / "stage1", 0)


def test_bad_input_costs_one_line(small, tabletop, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(tabletop, cut)
    path = cut / "demos/lift_cube/0000/agentview_rgb.png"
    path.write_bytes(path.read_bytes()[:300])
    new = "--out", tmp_path / "x", "--device", "cpu"
    for words, told in ((("train", "--data-root", cut, *new), "cut short"),
                        (("train", "--data-root", tmp_path, *new), "world.json"),
                        (("train", "--data-root", tabletop, "--base", tmp_path, *new), str(tmp_path)),
                        (("train", "--data-root", tabletop, "--views", "3", *new), "--views 3"),
                        (("ablate", "--claim", "fame"), "one of main"),
                        (("eval", "--ckpt", tmp_path / "none"), "no such folder"),
                        (("ablate", "--claim", "main", "--arms", "A", "Z"), "--arms Z: main has base")):
        assert told in fails(capsys, *words), words


def test_describe_shows_both_sides(small, capsys):
    run("describe")
    printed = capsys.readouterr().out
    assert all(x in printed for x in ("pi0 base", "three.predictor", "0.086 B", "FLOPs a plan"))


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_paper_adds_about_what_it_says(preset):
    with torch.device("meta"):
        three = V.ThreeD(V.PRESETS[preset], 2048, 2048)
    idle = sum(x.numel() for part in (three.teacher, three.completer) for x in part.parameters())
    assert abs((sum(x.numel() for x in three.parameters()) - idle) / 1e9 - 0.086) < 0.01


def test_the_simulators_environment_needs_no_nuscenes():
    """LIBERO's environment has numpy 2 and no nuScenes devkit: neither it nor our worlds are imported."""
    names = "{'nuscenes', 'pyquaternion', 'shapely', 'data'}"
    code = f"import sys, threedvla; print({names} & {{m.split('.')[0] for m in sys.modules}})"
    where = Path(V.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=where, check=True)
    assert out.stdout.strip() == "set()"
