"""Base policy X-VLA (arXiv 2510.10274): a soft-prompted transformer that predicts the clean actions.

An encoder reads the first view and the text; the other views stay beside it. The transformer reads [actions |
encoder | other views | added tokens | soft prompts]. Learned positions belong to slots counted from the
front, so what is added behind the other views moves nothing.

Ours: LIBERO's 7 numbers instead of ee6d's 20, one embodiment's soft prompts, a plain ViT instead of
Florence-2. The paper sizes are pi0's (2.1 B parameters; X-VLA itself has 0.9 B). The policy protocol and the
letters are those of common.networks.pi0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks.pi0 import (ConvStem, Prefix, Sizes, one_step_error, pad, pi0_flow, pi0_time_embedding,
                                 tokenize)
from common.networks.transformer import Block


class XVLA(nn.Module):
    """X-VLA's shape at any size.

    gripper: index of the action channel that is open or closed. added: slots for a plug-in's tokens.
    """

    def __init__(self, sizes: Sizes, views: int = 2, gripper: int = 6, added: int = 0, l1: int | None = None):
        super().__init__()
        d, e, c = sizes.lm_width, sizes.expert_width, sizes.vision_width
        self.sizes, self.gripper, self.width, self.map_width = sizes, gripper, d, d
        self.grid, self.chunk = sizes.grid, sizes.chunk
        self.state_dim, self.action_dim = sizes.state_dim, sizes.action_dim
        self.backbone = nn.ModuleDict({"stem": ConvStem(c) if sizes.stem == "conv"
                                       else nn.Conv2d(3, c, sizes.patch, sizes.patch),
                                       "vision": nn.ModuleList(Block(c, sizes.vision_heads) for _
                                                               in range(sizes.vision_layers)),
                                       "project": nn.Linear(c, d), "words": nn.Embedding(sizes.vocabulary, d),
                                       "encoder": nn.ModuleList(Block(d, sizes.heads) for _
                                                                in range(sizes.lm_layers))})
        self.backbone.register_parameter("places", nn.Parameter(0.02 * torch.randn(self.grid**2, c)))
        self.backbone.register_parameter("order", nn.Parameter(0.02 * torch.randn(sizes.text_tokens, d)))
        self.action_in = nn.Linear(self.action_dim + self.state_dim + e, e)
        self.from_encoder, self.from_views = nn.Linear(d, e), nn.Linear(d, e)
        self.l1, self.steps = l1, sizes.flow_steps if l1 is None else 1
        slots = self.chunk + self.grid**2 * views + sizes.text_tokens + added
        self.slots = nn.Parameter(0.02 * torch.randn(slots, e))
        self.prompts = nn.Parameter(0.02 * torch.randn(sizes.soft_prompts, e))
        self.layers = nn.ModuleList(Block(e, sizes.heads) for _ in range(sizes.lm_layers))
        self.out = nn.Sequential(nn.LayerNorm(e), nn.Linear(e, self.action_dim))

    def vlm(self) -> nn.Module:
        """The part that stays frozen behind a trained base policy."""
        return self.backbone

    def word_size(self) -> float:
        """Root mean square of the word embeddings."""
        return float(self.backbone["words"].weight.detach().float().square().mean().sqrt())

    def encode(self, images: Tensor, texts: list[str], state: Tensor) -> Prefix:
        """Images and words -> encoder tokens of view 0 and text, then the other views'."""
        net, (B, V) = self.backbone, images.shape[:2]
        x = net["stem"](images.flatten(0, 1) * 2 - 1).flatten(2).mT + net.places  # (B V, h w, C)
        for block in net["vision"]:
            x = block(x)
        x = net["project"](x).unflatten(0, (B, V))  # (B, V, h w, d)
        ids, known = (t.to(x.device) for t in tokenize(texts, self.sizes))
        tokens = torch.cat([x[:, 0], net["words"](ids) + net.order], 1)
        mask = torch.cat([known.new_ones(B, self.grid**2), known], 1)
        for block in net["encoder"]:
            tokens = block(tokens, mask.bool())
        maps = x.mT.unflatten(-1, (self.grid, self.grid))  # (B, V, d, h, w)
        tokens = torch.cat([tokens, x[:, 1:].flatten(1, 2)], 1)
        mask = torch.cat([mask, mask.new_ones(B, (V - 1) * self.grid**2)], 1)
        return Prefix(tokens, mask, maps)

    def read(self, prefix: Prefix) -> Prefix:
        """The prefix with the image tokens behind the encoder (view 0) or beside it (the other views)."""
        n = self.grid**2
        first, _, others = prefix.tokens.tensor_split([n, n + self.sizes.text_tokens], 1)
        return prefix._replace(last=torch.cat([first, others], 1))

    def clean(self, prefix: Prefix, state: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, A, D) at time t (B,) -> the actions it comes from (B, A, D)."""
        e, A = self.prompts.shape[1], self.chunk
        beside = torch.cat([pad(state, self.state_dim), pi0_time_embedding(t, e, self.sizes.min_period)], -1)
        actions = self.action_in(torch.cat([x_t, beside[:, None].expand(-1, A, -1)], -1))
        first, others = prefix.tokens.tensor_split([self.grid**2 + self.sizes.text_tokens], 1)
        x = torch.cat([actions, self.from_encoder(first), self.from_views(others)], 1)
        x = torch.cat([x + self.slots[: x.shape[1]], self.prompts.expand(len(x), -1, -1)], 1)
        ones = prefix.mask.new_ones
        mask = torch.cat([ones(len(x), A), prefix.mask, ones(len(x), len(self.prompts))], 1).bool()
        for block in self.layers:
            x = block(x, mask)
        return self.out(x[:, :A])

    def loss(self, prefix: Prefix, state: Tensor, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Error (B, A, D) of the clean actions, and cross-entropy for the gripper's channel."""
        actions, g = pad(actions, self.action_dim), self.gripper
        out = self.clean(prefix, state, pi0_flow(actions, noise, time)[0], time)
        closed = (actions[..., g] > 0).to(out)
        grip = F.binary_cross_entropy_with_logits(out[..., g], closed, reduction="none")
        error = (out - actions).square() if self.l1 is None else one_step_error(out, actions, g)
        return torch.cat([error[..., :g], grip[..., None], error[..., g + 1 :]], -1)

    def act(self, prefix: Prefix, state: Tensor, noise: Tensor) -> Tensor:
        """-> (B, A, D): from t = 1 on the clean actions are predicted, and noised a little less each time."""
        x, steps, g = noise, self.steps, self.gripper
        for i in range(steps):
            out = self.clean(prefix, state, x, x.new_full(x.shape[:1], 1 - i / steps))
            grip = torch.tanh(out[..., g : g + 1] / 2)  # 2 sigmoid - 1
            out = torch.cat([out[..., :g], grip, out[..., g + 1 :]], -1)
            t = 1 - (i + 1) / steps
            x = t * noise + (1 - t) * out
        return x
