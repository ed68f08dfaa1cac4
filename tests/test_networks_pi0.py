"""pi0, pi0.5 and X-VLA: transformers' own pi0 bit for bit, flow matching by hand, the finder, words;
attention that is shared by the networks."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from small_policy import SIZES, SMALL, agent_of, encode
from vectors import load

import threedvla as V
from common.files import InputError
from common.networks import pi0
from common.networks.pi0 import Prefix, pi0_flow, pi0_time_embedding, pi0_time_quantile, tokenize
from common.networks.transformer import DeformableAttention


pytestmark = pytest.mark.usefixtures("seeded")


def test_hooked_pi0_is_transformers_pi0_bit_for_bit(observations):
    agent = agent_of(variant="base", w_ground=0.0)
    batch, noise = V.observe(observations, SMALL), torch.randn(3, 4, 7)
    state = agent.state(batch)
    with torch.no_grad():
        ours = agent.policy.act(agent.prefix(batch)[0], state, noise)
        ids, mask = tokenize(batch.texts, SIZES)
        slots = 2 * agent.policy.grid**2
        theirs = agent.policy.net.sample_actions(
            state, input_ids=torch.cat([ids.new_full((3, slots), SIZES.vocabulary), ids], 1),
            pixel_values=batch.images * 2 - 1, noise=noise,
            attention_mask=torch.cat([mask.new_ones(3, slots), mask], 1),
            pixel_attention_mask=torch.ones(3, 2, dtype=torch.bool), num_steps=2)
    assert torch.equal(ours, theirs)
    actions, time = torch.randn(3, 4, 7), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        prefix = agent.prefix(batch)[0]
        error = agent.policy.loss(prefix, state, actions, noise, time)
        agent.policy.net.config.loss_reduction = "none"
        out = agent.policy.net(state=state, noise=noise, timestep=time, inputs_embeds=prefix.tokens,
                               actions=actions, pixel_values=batch.images, attention_mask=prefix.mask)
    assert torch.allclose(error, out.loss, atol=1e-6)


@pytest.mark.parametrize("policy", ["pi0", "pi05", "xvla"])
def test_a_frozen_vlm_still_teaches_the_tokens(observations, policy):
    agent = agent_of(policy=policy, variant="C")
    agent.set_stage(1)
    batch = V.observe(observations, SMALL)
    tokens = torch.randn(3, 5, agent.policy.width, requires_grad=True)
    prefix = V.plug(encode(agent, batch), tokens, torch.ones(3, 5))
    agent.policy.loss(prefix, agent.state(batch), *(torch.randn(3, 4, 7) for _ in range(2)),
                      torch.rand(3)).mean().backward()
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in agent.policy.vlm().parameters())


def test_one_step_answers_with_the_actions(observations):
    """--head l1: the velocity from nothing is the actions, negated; squares for the gripper alone."""
    out, true = torch.zeros(1, 1, 3), torch.tensor([[[2.0, -3.0, 0.5]]])
    assert pi0.one_step_error(out, true, 1).tolist() == [[[6.0, 18.0, 0.75]]]
    agent = agent_of(variant="base", head="l1")
    batch, policy = V.observe(observations, SMALL), agent.policy
    zero, one = torch.zeros(3, 4, 7), torch.ones(3)
    with torch.no_grad():
        prefix, state = agent.prefix(batch)[0], agent.state(batch)
        velocity = policy.velocity(policy.read_all(prefix), state, zero, one)
        assert torch.allclose(policy.act(prefix, state, zero), -velocity)
        assert policy.loss(prefix, state, -velocity, zero, one).abs().max() < 1e-6
    step = V.draw_step(V.replace(SMALL, head="l1"), 3, 0, 1)
    assert not step["noise"].any() and (step["time"] == 1).all()


def test_padded_action_channels_learn_to_be_zero(observations):
    policy = pi0.Pi0(SIZES._replace(action_dim=10))
    batch = V.observe(observations, SMALL)
    prefix = policy.encode(batch.images, batch.texts, batch.state)
    policy.loss(prefix, batch.state, torch.zeros(3, 4, 7), torch.randn(3, 4, 10),
                torch.rand(3)).mean().backward()
    assert (policy.net.action_out_proj.weight.grad.abs().sum(1) > 0).all()


def test_pi05_puts_the_state_into_words_and_time_into_norms():
    ids, mask = tokenize(["lift it"], SIZES, state=torch.tensor([[-9.0, 0.0, 9.0]]))
    last = SIZES.vocabulary
    assert ids[0, :5].tolist()[2:] == [last - 256, last - 128, last - 1] and mask.sum() == 5
    agent = agent_of(policy="pi05", variant="base")
    norms = [m for m in agent.modules() if isinstance(m, pi0.TimeNorm)]
    assert len(norms) == 2 * SIZES.lm_layers + 1  # and the expert's last one
    loaded = torch.nn.RMSNorm(4)
    loaded.eps, loaded.weight.data = 1e-6, torch.tensor([0.0, 0.5, 1.0, -0.5])
    begun = pi0.TimeNorm(loaded, 4, {"embedding": torch.randn(2, 4)})(torch.ones(2, 1, 4))
    # a loaded norm's weights stay
    assert torch.allclose(begun, (1 + loaded.weight).expand(2, 1, 4), atol=1e-4)
    x = torch.randn(2, 3, 32)
    norms[0].time["embedding"] = torch.randn(2, 32)
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norms[0].eps)
    assert torch.allclose(norms[0](x), plain) and (norms[0].gate == 1).all()  # starts as the plain norm
    torch.nn.init.normal_(norms[0].modulate.weight)
    moved = norms[0](x)
    norms[0].time["embedding"] = torch.randn(2, 32)
    assert not torch.allclose(moved, norms[0](x))


def test_no_two_words_of_the_world_are_one():
    from data.tabletop import TASKS

    texts = [text for task in TASKS.values() for text in (*task.words, *task.held_out)]
    words = sorted({w for text in texts for w in text.lower().split()})
    ids, _ = tokenize(words, pi0.SIZES["tiny"])
    assert len(set(ids[:, 0].tolist())) == len(words) > 80
    longest = max((text for task in TASKS.values() for text in task.held_out), key=lambda t: len(t.split()))
    _, mask = tokenize([longest], pi0.SIZES["tiny"], state=torch.zeros(1, 8))
    assert mask.sum() == len(longest.split()) + 8  # pi0.5's state takes no word away


def test_saved_weights_load_or_say_what_does_not_fit(tmp_path):
    folder, sizes = str(tmp_path / "pi0"), SIZES._replace(stem="patch")
    pi0.Pi0(sizes).net.save_pretrained(folder)
    assert pi0.Pi0(sizes, vlm=folder).weights == folder
    with pytest.raises(InputError, match=r"weights of other sizes \(chunk 4\)"):
        pi0.Pi0(sizes._replace(chunk=5), vlm=folder)
    with pytest.raises(InputError, match="no tokenizer there"):
        tokenize(["lift it"], sizes, folder)


def test_xvla_predicts_clean_actions():
    agent = agent_of(policy="xvla", variant="base")
    agent.policy.clean = lambda prefix, state, x, t: torch.full_like(x, 0.25)  # an answer that never changes
    prefix = Prefix(torch.zeros(1, 1, 32), torch.ones(1, 1), None)
    out = agent.policy.act(prefix, torch.zeros(1, 8), torch.randn(1, 4, 7))
    assert torch.allclose(out[..., :6], torch.full((1, 4, 6), 0.25))
    assert torch.allclose(out[..., 6], torch.tensor(math.tanh(0.125)))


# --- flow matching
# ----------------------------------------------------------------------------------------------------


def test_vectors_flow():
    v = load("robot_flow")
    x_t, u_t = pi0_flow(*(torch.from_numpy(v[k]) for k in ("fm_actions", "fm_noise", "fm_time")))
    v.close("fm_x_t", x_t, atol=1e-6)
    v.close("fm_u_t", u_t, atol=1e-6)
    v.close("time_quantile", pi0_time_quantile(torch.from_numpy(v["time_quantile_q"])), atol=1e-6)
    for dim in (8, 64):
        v.close(f"pe_{dim}", pi0_time_embedding(torch.from_numpy(v["pe_time"]).double(), dim), atol=1e-6)


def test_flow_by_hand():
    a, n = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -2.0]]])
    x, u = pi0_flow(a, n, torch.tensor([0.25]))
    assert torch.allclose(x, torch.tensor([[[1.5, 1.0]]])) and torch.allclose(u,
                                                                              torch.tensor([[[2.0, -4.0]]]))
    assert torch.equal(pi0_flow(a, n, torch.tensor([1.0]))[0],
                       n) and torch.equal(pi0_flow(a, n, torch.tensor([0.0]))[0], a)


def test_times_follow_the_beta_law():
    t = pi0_time_quantile(torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert t.min() >= 0.001 and t.max() <= 1
    law = stats.kstest((t.numpy() - 0.001) / 0.999, stats.beta(1.5, 1).cdf)
    assert law.pvalue > 0.01 and t.median() > 0.6  # more of them near noise


def test_time_embedding_by_hand():
    out = pi0_time_embedding(torch.tensor([0.25]), 4, 0.5, 2.0)
    expected = [math.sin(math.pi), math.sin(math.pi / 4), math.cos(math.pi), math.cos(math.pi / 4)]
    assert torch.allclose(out[0], torch.tensor(expected), atol=1e-6)
    with pytest.raises(ValueError, match="even"):
        pi0_time_embedding(torch.zeros(1), 3)


# --- attention
# --------------------------------------------------------------------------------------------------------


def test_deformable_attention_is_a_slow_loop():
    net = DeformableAttention(8, 2, points=2)
    torch.nn.init.normal_(net.offset.weight, std=0.3), torch.nn.init.normal_(net.weight.weight)
    content, uv = torch.randn(1, 3, 8), torch.rand(1, 2, 3, 2)
    pyramid = [torch.randn(1, 2, 8, n, n) for n in (6, 3, 2)]
    with torch.no_grad():
        out = net(content, uv, pyramid)
        offset = net.offset(content)[0].view(3, 2, 3, 2, 2)
        weight = net.weight(content)[0].view(3, 2, 6).softmax(-1).view(3, 2, 3, 2)
        assert torch.allclose(weight.sum((2, 3)), torch.ones(3, 2))
        for v, q in itertools.product(range(2), range(3)):
            heads = []
            for m in range(2):
                total = torch.zeros(4)
                for l, level in enumerate(pyramid):
                    value = net.value(level[0, v].flatten(1).T).T.view(8, *level.shape[-2:])[4 * m : 4 * m
                                                                                             + 4]
                    size = torch.tensor([level.shape[-1], level.shape[-2]])
                    for k in range(2):
                        where = 2 * (uv[0, v, q] + offset[q, m, l, k] / size) - 1
                        at = F.grid_sample(value[None], where.view(1, 1, 1, 2), align_corners=False)[0, :, 0,
                                                                                                     0]
                        total += weight[q, m, l, k] * at
                heads.append(total)
            assert torch.allclose(out[0, v, q], net.out(torch.cat(heads)), atol=1e-5)
    assert np.isclose(float(net.offset.bias.view(2, 3, 2, 2)[0, 0, 1, 0]), 2)  # heads look in a ring at first
