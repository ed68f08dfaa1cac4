"""Features of a frozen image encoder, computed once a keyframe and kept beside the labels.

    views = frozen_views(net.encoder, dataset, labels)     # prints their number and size; None: it learns
    item = views(i)                                        # as verbs.inputs(dataset[i]), features for images

A training step then costs only what lies behind the encoder. Colours cannot be jittered any more.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.backbones import ImageEncoder, UpNeck
from common.files import read_npz, write_npz
from common.geometry import scale_to
from common.train import joined


def weights_key(encoder: ImageEncoder, size: tuple[int, int]) -> str:
    """Names a backbone's weights and the images' size."""
    digest = hashlib.sha256(repr(size).encode())
    for name, value in sorted(encoder.backbone.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


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
        if run.world > 1:
            torch.distributed.barrier()  # a rank reads what the others made
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
