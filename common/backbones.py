"""Image encoders and small 3D blocks: what two papers would otherwise each write again.

    Name            Input -> output                                     Note
    ImageEncoder    (..., 3, H, W) in [0, 1] -> (..., C, H/4, W/4)      conv, street, efficientnet-lite0, transformers
    UpNeck          1/8 and 1/16 features -> 1/4                        OccNeRF's decoder
    UNet3D          (B, C, X, Y, Z) -> (B, channels[0], X, Y, Z)        residual blocks, skips; any X, Y, Z
    norm_layer      group | batch | instance, 2D or 3D
    describe        a table of shapes, parameters, FLOPs and saved activations, on the meta device

Nothing is downloaded unless --backbone names a hub id that is not in the local cache (HF_HUB_OFFLINE=1: never).
Weights are read as safetensors only.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import InputError
from common.pretrained import load_pretrained, loading

REMEDY = ", or --backbone conv"
STREET = {"street": "classes, objects and words", "street-depth": "classes, objects, words and metric depth"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Architectures written out, so that `describe` and random initialisation need neither network nor cache.
RESNETS = {"resnet-18": ("basic", (2, 2, 2, 2)), "resnet-50": ("bottleneck", (3, 4, 6, 3)),
           "resnet-101": ("bottleneck", (3, 4, 23, 3))}  # fmt: skip
DINOV2 = {"dinov2-small": (384, 12, 6), "dinov2-base": (768, 12, 12), "dinov2-large": (1024, 24, 16)}


def norm_layer(kind: str, channels: int, dims: int = 2) -> nn.Module:
    """kind: group (two channels a group, an odd count is one; independent of the batch), batch, or instance
    (no affine, OccNeRF's).

    Groups are small because a voxel grid is mostly empty: in a large one the few strong channels suppress the
    others, and the tiny networks here then learn several times slower."""
    if kind == "group":
        return nn.GroupNorm(channels // 2 if channels % 2 == 0 else 1, channels)
    if kind == "batch":
        return (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(channels)
    if kind == "instance":
        return (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(channels)
    raise ValueError(f"norm {kind!r}: group, batch or instance")


def conv_norm_relu(c_in: int, c_out: int, norm: str, dims: int = 2, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """'Same'-padded convolution without bias (every norm here removes the mean), norm, ReLU."""
    conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, norm_layer(norm, c_out, dims), nn.ReLU(inplace=True))


class UpNeck(nn.Module):
    """Two up-sampling steps of OccNeRF's encoder: [1/16 up, concat 1/8] -> 512, up -> 256, 1x1 -> C, at 1/4."""

    def __init__(self, fine: int, coarse: int, channels: int, norm: str = "instance", width: int = 512):
        super().__init__()
        self.merge = nn.Sequential(*(conv_norm_relu(c, width, norm) for c in (fine + coarse, width)))
        self.refine = nn.Sequential(*(conv_norm_relu(c, width // 2, norm) for c in (width, width // 2)))
        self.out = nn.Conv2d(width // 2, channels, 1)

    def forward(self, fine: Tensor, coarse: Tensor, size: tuple[int, int]) -> Tensor:
        """fine (B, C1, h, w), coarse (B, C2, h', w') -> (B, C, *size)."""
        x = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        x = self.merge(torch.cat([x, fine], dim=1))  # (B, 512, h, w)
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return self.out(self.refine(x))  # (B, C, *size)


class ConvBackbone(nn.Module):
    """Small feature pyramid for a CPU: strides 2, 4, 8, 16, summed top-down into stride 4. Ours."""

    def __init__(self, channels: int, norm: str = "group", widths: tuple[int, int, int, int] = (24, 32, 64, 96),
                 c_in: int = 3):
        super().__init__()
        a, b, c, d = widths
        self.stem = conv_norm_relu(c_in, a, norm, stride=2)  # 1/2
        self.stages = nn.ModuleList(
            nn.Sequential(conv_norm_relu(i, o, norm, stride=2), conv_norm_relu(o, o, norm))
            for i, o in ((a, b), (b, c), (c, d))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, channels, 1) for w in (b, c, d))
        self.smooth = conv_norm_relu(channels, channels, norm)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C, ceil(H/4), ceil(W/4))."""
        x, pyramid = self.stem(images.contiguous(memory_format=torch.channels_last)), []  # a tenth faster on a CPU
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            pyramid.append(lateral(x))  # (B, C, H/4 ..), (.. H/8), (.. H/16)
        top = pyramid.pop()
        while pyramid:
            finer = pyramid.pop()
            top = finer + F.interpolate(top, finer.shape[-2:], mode="bilinear", align_corners=False)
        return self.smooth(top)


def encoder_rate(name: str, lr: float) -> float:
    """Ours: an encoder with learned weights (street) learns at a tenth of the rate of new modules."""
    return 0.1 * lr if name in STREET else lr


def start_of(name: str) -> str:
    """What --backbone knew before this training, for a protocol line."""
    plain = name.removesuffix("+frozen")
    knew = f" ({STREET[plain]}, from single pictures of other streets)" if plain in STREET else ""
    return f"{plain}{knew or ' (random weights)' * (plain == 'conv')}{', frozen' * (plain != name)}"


class ImageEncoder(nn.Module):
    """Images in [0, 1] -> features at 1/4 resolution; ImageNet normalisation inside.

    name: conv; street or street-depth (common/networks/street.py, in this repository); efficientnet-lite0 (a pip
    package); a hub id such as microsoft/resnet-101 or facebook/dinov2-base; or a local folder of transformers.
    With "+frozen" behind it, its weights do not learn, only the neck does; `see` may then be cached (FrozenViews).
    pretrained False: random weights, the architecture from this file (or the local folder's config.json).
    """

    def __init__(self, name: str, channels: int, norm: str = "group", pretrained: bool = True):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        name, self.frozen, self.channels, self.patch = name.removesuffix("+frozen"), name.endswith("+frozen"), channels, 1
        self.known: list[int] = []  # channels of the probabilities that street-depth knows
        if name == "conv":
            self.backbone, self.neck = ConvBackbone(channels, norm), None
        elif name in STREET:
            from common.networks.street import KNOWN, StreetFeatures

            self.backbone = StreetFeatures(name, pretrained)
            self.neck = nn.Conv2d(KNOWN[name], channels, 1)
            self.known = [18, bins] if (bins := KNOWN[name] - KNOWN["street"]) else []
        else:
            self.backbone, (fine, coarse) = load_backbone(name, pretrained)
            config = getattr(self.backbone, "config", None)
            self.patch = config.patch_size if config is not None and config.model_type == "dinov2" else 1
            width = 64 if name == "efficientnet-lite0" else 512  # a small network's neck is small
            self.neck = UpNeck(fine, coarse, channels, "instance" if norm == "batch" else norm, width)
        if self.frozen and self.neck is None:
            raise InputError(f"--backbone {name}+frozen: it has no weights but random ones; let it learn")
        if self.frozen:
            self.backbone.requires_grad_(False)
        self.learned = "encoder.backbone" if name in STREET else "encoder"  # what starts from weights, in a network

    def train(self, mode: bool = True) -> "ImageEncoder":
        """A frozen backbone keeps its batch statistics too."""
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def see(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (n, 3, H, W) -> what the backbone makes of them, before the neck."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if isinstance(self.neck, nn.Conv2d):  # the street's encoder normalises for itself
                return self.backbone(images)
            x, (h, w) = (images - self.mean) / self.std, images.shape[-2:]
            if self.neck is None:
                return self.backbone(x)
            whole = [max(1, round(s / self.patch)) * self.patch for s in (h, w)]
            if whole != [h, w]:
                x = F.interpolate(x, whole, mode="bilinear", align_corners=False)
            return self.backbone(x).feature_maps

    def forward(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) -> (..., C, ceil(H/4), ceil(W/4)). ViTs see the image resized to whole patches.

        A street's frozen features (..., K, H/4, W/4), out of a cache, go through the neck alone.
        """
        return self.with_known(images)[0]

    def with_known(self, images: Tensor) -> list[Tensor]:
        """As forward, a list: the C channels and, of street-depth, the 18 class and the depth bins' probabilities.

        They come apart: what a frozen encoder knows needs no gradient, the neck's channels do.
        """
        lead, (h, w) = images.shape[:-3], images.shape[-2:]
        x = images.flatten(0, -4)  # (B N, 3, H, W)
        seen, known = self.see(x) if x.shape[1] == 3 else x, []
        if self.neck is None:
            features = seen
        elif isinstance(self.neck, UpNeck):
            features = self.neck(*seen, (-(-h // 4), -(-w // 4)))
        else:
            features = self.neck(seen)
            known = seen[:, -sum(self.known) :].split(self.known, 1) if self.known else []
        return [x.unflatten(0, lead) for x in (features, *known)]  # (..., C, H/4, W/4) each


def load_backbone(name: str, pretrained: bool = True) -> tuple[nn.Module, tuple[int, int]]:
    """-> (a transformers backbone that gives two feature maps, their channels): 1/8 and 1/16 of a convolutional network
    (later stages are cut off), the middle and last block of a ViT. Raises InputError, which says how to get it."""
    from transformers import AutoConfig  # late: half a second that "conv" does not need

    short = name.split("/")[-1]
    if name == "efficientnet-lite0":
        from common.networks.efficientnet import EfficientNetLite0

        return (net := EfficientNetLite0(pretrained)), net.channels
    if not pretrained and not Path(name).is_dir():
        config = _written_config(short)
        if config is None:
            known = ", ".join([*RESNETS, *DINOV2])
            raise InputError(f"--backbone {name}: not a local folder, nor written in common/backbones.py ({known})")
    else:
        (config,) = load_pretrained("--backbone", name, AutoConfig, remedy=REMEDY)
    with loading("--backbone", name):
        return _cut(name, config, pretrained)


def _cut(name: str, config: Any, pretrained: bool) -> tuple[nn.Module, tuple[int, int]]:
    """The backbone of a transformers config, see `load_backbone`."""
    from transformers import AutoBackbone

    if config.model_type == "dinov2":
        config.out_indices = [config.num_hidden_layers // 2, config.num_hidden_layers]
    elif hasattr(config, "depths") and len(config.depths) >= 3:
        config.out_features = [f"stage{len(config.depths) - 2}", f"stage{len(config.depths) - 1}"]
    else:
        raise InputError(f"--backbone {name}: a {config.model_type} gives no feature pyramid; use a ResNet or DINOv2")
    if pretrained:  # by the class itself: AutoBackbone.from_pretrained (5.23) asks the hub even for a local folder
        with torch.device("meta"):
            architecture = type(AutoBackbone.from_config(config))
        (net,) = load_pretrained("--backbone", name, architecture, remedy=REMEDY, config=config)
    else:
        net = AutoBackbone.from_config(config)
    if config.model_type in ("resnet", "convnext"):
        net.encoder.stages = net.encoder.stages[:-1]  # 1/32 is not used: no time, no memory, no idle weights under DDP
    for parameter_name, parameter in net.named_parameters():
        if "mask_token" in parameter_name:
            parameter.requires_grad_(False)
    fine, coarse = net.channels
    return net, (fine, coarse)


def _written_config(short: str) -> Any:
    from transformers import Dinov2Config, ResNetConfig

    if short in RESNETS:
        layer, depths = RESNETS[short]
        sizes = [64, 128, 256, 512] if layer == "basic" else [256, 512, 1024, 2048]
        return ResNetConfig(embedding_size=64, hidden_sizes=sizes, depths=list(depths), layer_type=layer)
    if short in DINOV2:
        width, layers, heads = DINOV2[short]
        return Dinov2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=518, patch_size=14
        )
    return None


# --- 3D --------------------------------------------------------------------------------------------------------------


class ResBlock3D(nn.Module):
    """x + conv-norm(conv-norm-ReLU(x)), then ReLU."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.first = conv_norm_relu(channels, channels, norm, dims=3)
        self.second = conv_norm_relu(channels, channels, norm, dims=3)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class UNet3D(nn.Module):
    """Residual U-Net on a voxel grid with len(channels) levels: strided convolutions down, trilinear up, sums.

    Halves X, Y and Z per level; sizes need not be even. Works in bf16 autocast and in channels_last_3d.
    """

    def __init__(self, c_in: int, channels: tuple[int, ...] = (16, 32, 64), norm: str = "group"):
        super().__init__()
        # the finest level costs most and sees least: one 1x1x1 convolution on the way down, one 3x3x3 on the way up
        self.stem = conv_norm_relu(c_in, channels[0], norm, dims=3, kernel=1)
        pairs = list(zip(channels[:-1], channels[1:]))
        self.blocks = nn.ModuleList(ResBlock3D(c, norm) for c in channels[1:])
        self.down = nn.ModuleList(conv_norm_relu(a, b, norm, dims=3, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairs)
        self.out = nn.ModuleList(conv_norm_relu(a, a, norm, dims=3) for a, _ in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, channels[0], X, Y, Z)."""
        x = x.contiguous(memory_format=torch.channels_last_3d)  # trilinear up-sampling: 1.4 ms instead of 9.7 on a CPU
        x = self.stem(x)
        skips = []
        for down, block in zip(self.down, self.blocks, strict=True):
            skips.append(x)
            x = block(down(x))  # (B, C_l, X / 2^l, Y / 2^l, Z / 2^l)
        for up, out in zip(reversed(self.up), reversed(self.out), strict=True):
            skip = skips.pop()
            # 1x1x1 before up-sampling: an eighth of the work, the same linear map
            x = out(skip + F.interpolate(up(x), skip.shape[-3:], mode="trilinear", align_corners=False))
        return x


# --- describe --------------------------------------------------------------------------------------------------------


def describe(net: nn.Module, *inputs: Any, depth: int = 2, train: bool = True) -> dict[str, float]:
    """Prints a table of sub-modules: output shape, parameters, forward FLOPs; -> {params, flops, activation_gb, ...}.

    Build net and inputs under `torch.device("meta")`: nothing is computed or allocated. activation_gb sums the distinct
    tensors that autograd saves in one forward pass (at their own dtype: float32; bf16 autocast about halves it);
    weights_gb is parameters, gradients and AdamW's two moments in float32.
    """
    from torch.utils.flop_counter import FlopCounterMode

    names = {module: name for name, module in net.named_modules() if name and name.count(".") < depth}
    shapes: dict[str, str] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        shapes[names[module]] = _shape(output)

    hooks = [module.register_forward_hook(note) for module in names]
    parameters = {p.untyped_storage()._cdata for p in net.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive, so that an address is not used twice

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    net.train(train)
    try:
        with counter, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = net(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(net).__name__
    rows = [("module", "output", "parameters", "GFLOPs")]
    for name in names.values():
        module = net.get_submodule(name)
        count = sum(p.numel() for p in module.parameters())
        if name in shapes:
            rows.append((name, shapes[name], f"{count:,}", f"{flops.get(f'{root}.{name}', 0) / 1e9:.2f}"))
    params = sum(p.numel() for p in net.parameters())
    total = {
        "params": params,
        "flops": float(flops.get("Global", 0)),
        "activation_gb": sum(s.nbytes() for s in saved.values()) / 1e9,
        "weights_gb": 16 * params / 1e9,
    }
    rows.append(("total", _shape(output), f"{params:,}", f"{total['flops'] / 1e9:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}")
    print(
        f"memory of a training step, float32: activations {total['activation_gb']:.2f} GB"
        f" + weights, gradients and AdamW {total['weights_gb']:.2f} GB; forward {total['flops'] / 1e9:.1f} GFLOPs"
    )
    return total


def describe_parts(run: Callable[[], Any], parts: dict[str, nn.Module]) -> None:
    """Print parameters and forward FLOPs of some modules (a ModuleDict: its modules') in one call of `run`."""
    from torch.utils.flop_counter import FlopCounterMode

    counter, flops = FlopCounterMode(display=False), dict.fromkeys(parts, 0)

    def count(name: str, sign: int, *_: Any) -> None:
        flops[name] += sign * counter.get_total_flops()

    for name, part in parts.items():
        for module in part.values() if isinstance(part, nn.ModuleDict) else [part]:
            module.register_forward_pre_hook(partial(count, name, -1))
            module.register_forward_hook(partial(count, name, 1))
    with counter:
        run()
    for name, part in parts.items():
        parameters = sum(p.numel() for p in part.parameters()) / 1e6
        print(f"{name:20} {parameters:10.2f} M parameters {flops[name] / 1e9:12.2f} GFLOPs")


def describe_memory(name: str, net: nn.Module) -> None:
    """Print what learns, what is frozen, and the memory of weights, gradients and AdamW in float32."""
    sizes = [(p.numel() / 1e6, p.requires_grad) for p in net.parameters()]
    learn, frozen = (sum(n for n, grad in sizes if grad == which) for which in (True, False))
    print(f"{name:20} {learn:10.2f} M learn, {frozen:10.2f} M frozen: weights, gradients, AdamW "
          f"{(16 * learn + 4 * frozen) / 1e3:.2f} GB in float32")


def _shape(value: Any) -> str:
    """(1, 2) of a tensor; of a dict, tuple or list the first tensor's, and ".." for those after it."""
    if isinstance(value, Tensor):
        return "(" + ", ".join(map(str, value.shape)) + ")"
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    shapes = list(filter(None, map(_shape, parts)))
    return " ".join(shapes) if len(shapes) < 2 else f"{shapes[0].removesuffix(' ..')} .."
