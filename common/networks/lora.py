"""Adapters of low rank on frozen linear layers: LoRA, Hu et al., arXiv 2106.09685.

    add_lora(language_model.layers, rank=16)      # every linear layer inside
    learning = lora_parts(language_model)         # what learns
"""

from torch import Tensor, nn


class LoRA(nn.Module):
    """W x + B A x, B = 0 at first."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_lora(module: nn.Module, rank: int) -> None:
    """Puts an adapter on every linear layer in `module`."""
    for part in list(module.modules()):
        for name, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(part, name, LoRA(linear, rank))


def lora_parts(module: nn.Module) -> list[nn.Module]:
    """The adapters' own layers."""
    return [layer for part in module.modules() if isinstance(part, LoRA) for layer in (part.down, part.up)]
