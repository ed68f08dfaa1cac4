"""A 3DVLA small enough for tests: SIZES and POINTS get an entry `small`, SMALL is the Config that names
it.
"""

import torch

import threedvla as V
from common.networks import pi0, pointattn
from common.robot import make_environment

pi0.SIZES["small"] = pi0.SIZES["tiny"]._replace(
    image_size=64, vision_width=32, vision_layers=1, vision_heads=2, vision_mlp=32, lm_width=32, lm_layers=2,
    lm_mlp=32, expert_width=32, expert_mlp=32, heads=2, head_dim=16, chunk=4, flow_steps=2, soft_prompts=2)
pointattn.POINTS["small"] = 32
V.Config.__annotations__["sizes"] = 'Literal["tiny", "libero", "paper", "small"]'  # a run's config.json may name it
SIZES = pi0.SIZES["small"]
SMALL = V.replace(V.PRESETS["tiny"], sizes="small", head="flow", width=48, heads=2, fusion_layers=1,
                  probes=12, mask_width=8, sample_heads=2, batch=4, head_batch=6, base_steps=2, stage1_steps=2,
                  stage2_steps=2)


def sized(monkeypatch, **changes) -> str:
    """The name of an entry of SIZES that differs from `small` in these fields, for one test."""
    monkeypatch.setitem(pi0.SIZES, "other", SIZES._replace(**changes))
    monkeypatch.setitem(pointattn.POINTS, "other", 32)
    return "other"


def agent_of(three=V.ThreeD, **changes) -> V.Agent:
    torch.manual_seed(1)
    return V.Agent(V.replace(SMALL, **changes), three).eval()


def look(size: int = 64) -> list:
    """Three observations of the tabletop world."""
    env = make_environment("tabletop", size=size)
    return [env.reset(task, 5) for task in ("can_in_basket", "sort_cubes", "lift_cube")]


def encode(agent: V.Agent, batch: V.Batch) -> pi0.Prefix:
    """The policy's own prefix."""
    return agent.policy.encode(batch.images, batch.texts, agent.state(batch))


def train_batch(observations: list, cfg: V.Config, step: int = 0, targets: bool = False) -> V.Batch:
    """Observations as a training batch: no movement as actions, the draws of `step`."""
    n, size = len(observations), pi0.SIZES[cfg.sizes]
    batch = V.observe(observations, cfg)._replace(
        actions=torch.zeros(n, size.chunk, 7), valid=torch.ones(n, size.chunk, dtype=torch.bool),
        **V.draw_step(cfg, n, 0, step))
    if not targets:
        return batch
    found = []
    for o in observations:
        b = V.observe([o], cfg)
        scene = (x[0].numpy() for x in (b.depth, b.K, b.T_base_cam))
        found.append(V.Targets(*V.pseudo_targets(V.instance_masks(o), *scene, cells=4 * size.grid)))
    return batch._replace(targets=V.Targets(*(V.pad_sequence(x, True) for x in zip(*found))))
