"""What a frozen network gives for each sample, computed once and kept on disk.

    views = frozen_views(net.encoder, dataset, labels)     # prints their number and size; None: it learns
    item = views(i)                                        # as verbs.inputs(dataset[i]), features for images

    rows = frozen_rows(folder, len(frames), make)          # make(indices) -> a NamedTuple of tensors (n, ...)
    tokens = rows([3, 17])                                 # the same NamedTuple of these samples

A training step then costs only what lies behind the encoder. Colours cannot be jittered any more.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

from common.backbones import ImageEncoder, UpNeck
from common.files import atomic, read_npz, write_npz
from common.geometry import scale_to
from common.train import barrier, joined


def weights_key(encoder: ImageEncoder, size: tuple[int, int]) -> str:
    """Names a backbone's weights and the images' size."""
    return digest(encoder.backbone, size)


def digest(net: nn.Module, *values: Any) -> str:
    """Names a network's weights and whatever else a cache depends on."""
    found = hashlib.sha256("".join(map(repr, values)).encode())
    for name, value in sorted(net.state_dict().items()):
        array = value.detach().cpu().contiguous()
        found.update(name.encode() + array.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


@torch.no_grad()
def frozen_rows(folder: Path, count: int, make: Callable[[list[int]], Any], size: int = 64,
                device: torch.device | str = "cpu") -> Callable[[list[int]], Any]:
    """Compute make(indices) for `count` samples, `size` at once; -> indices -> the same on the device.

    The folder is renamed to its name last: it is whole. Wide rows are kept in half precision. make gives
    NamedTuples, also nested, of tensors (n, ...) and None.
    """
    run, like = joined(), make([0])
    leaves, spec = tree_flatten(like)
    tensors = [x for x in leaves if x is not None]
    if run.is_main and not folder.is_dir():
        with atomic(folder, folder=True) as new:
            new.mkdir(exist_ok=True)
            files = [np.lib.format.open_memmap(new / f"{k}.npy", "w+", kept(x), (count, *x.shape[1:]))
                     for k, x in enumerate(tensors)]
            for first in tqdm(range(0, count, size), folder.name, unit="batch", leave=False, disable=None):
                now = make(list(range(first, min(first + size, count))))
                for file, x in zip(files, [x for x in tree_flatten(now)[0] if x is not None], strict=True):
                    file[first : first + size] = x.cpu().numpy()
            for file in files:
                file.flush()
    barrier(run)
    files = [np.load(folder / f"{k}.npy", mmap_mode="r") for k in range(len(tensors))]

    def rows(indices: list[int]) -> Any:
        read = iter([torch.from_numpy(file[indices]).to(device) for file in files])
        read = [None if x is None else next(read).to(x.dtype) for x in leaves]
        return tree_unflatten(read, spec)

    return rows


def kept(x: Tensor) -> np.dtype:
    """The type in which a tensor's rows are kept: float16 for wide ones."""
    return np.dtype("float16") if x.is_floating_point() and x[0].numel() > 256 else x.cpu().numpy().dtype


def frozen_views(encoder: ImageEncoder | None, dataset, labels: Path) -> "FrozenViews | None":
    """The cache of a frozen street encoder; None where a step needs images (it learns, or is no street)."""
    cached = encoder is not None and encoder.frozen and not isinstance(encoder.neck, UpNeck)
    return FrozenViews(encoder, dataset, labels) if cached else None


class FrozenViews:
    """Keyframe i -> images: features (6, K, H/4, W/4) before the neck, K for their resolution, T_ego_cam."""

    def __init__(self, encoder: ImageEncoder, dataset, labels: Path):
        self.dataset = dataset
        self.folder = Path(labels) / f"features-{weights_key(encoder, dataset.image_size)}"
        run, device = joined(), encoder.mean.device
        todo = [i for i in range(run.rank, len(dataset), run.world) if not self.path(i).is_file()]
        with torch.no_grad():
            for i in tqdm(todo, "frozen features", unit="keyframe", leave=False):
                images = torch.as_tensor(dataset[i].images).to(device)
                write_npz(self.path(i), features=encoder.see(images).half().cpu().numpy())
        barrier(run)  # a rank reads what the others made
        if run.is_main:
            size = sum(path.stat().st_size for path in self.folder.glob("*.npz")) / 1e6
            print(f"frozen features: {len(dataset)} keyframes, {size:.0f} MB -> {self.folder}")

    def path(self, i: int) -> Path:
        """The keyframe's file."""
        return self.folder / f"{self.dataset.tokens[i]}.npz"

    def __call__(self, i: int) -> dict[str, Tensor]:
        """Keyframe i -> its fields."""
        arrays = read_npz(self.path(i), {"features": (None, "float16")})
        features = torch.from_numpy(arrays["features"]).float()
        K, T_ego_cam, _ = map(torch.as_tensor, self.dataset.calibration(i))
        K = scale_to(K, self.dataset.image_size, features.shape[-2:])
        return {"images": features, "K": K.float(), "T_ego_cam": T_ego_cam.float()}
