"""A tiny PaliGemma 2 that has seen the web, in miniature: it stands for pre-trained weights where nothing may be downloaded.

    folder = make_tinyvlm("data/worlds/tinyvlm", vlm, processor, words)    # minutes, once; then --vlm FOLDER loads it

WHAT IT IS TAUGHT   What PaliGemma 2 has learned long before it drives: to tell what its patches show (its pre-training has
    segmentation and detection tasks) and to call it by its name. Two heads read the image tokens as the language model
    gets them: one draws a class map of a quarter patch's cells, one compares each token with the embeddings of the words
    for what can be asked for. Vision tower, projector and those embeddings learn; the language model's layers stay random,
    and nothing is said of depth, height or another camera: the third dimension is left to the method.

WHAT IT SEES   Photographs by a car's six cameras in streets of *other* worlds: their seed differs from any world that is
    trained or evaluated on, as the tiny CLIP's does, and no scene, object or calibration carries over.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.files import InputError, read_json, write_json
from common.nuscenes import FREE, LIDARSEG_TO_OCC3D
from common.train import Muon, param_groups, schedule, set_lr
from data.tinyclip import SEED_OFFSET

CELLS = 4  # cells per side of a patch in the class map
DRAWN = (144, 256)  # [px] rows, columns of the photographs before they are squeezed to the model's square


def make_pictures(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """-> images (n, size, size, 3) uint8 and Occ3D classes (n, size, size) uint8, sky is 17; n = count, in whole rigs of six."""
    import cv2

    from data.city import City
    from data.driving import CAMERA_LAYOUT, calibration, matrix, photograph

    rng, images, classes = np.random.default_rng([SEED_OFFSET + seed, 1]), [], []
    names = np.append(LIDARSEG_TO_OCC3D, np.full(256 - len(LIDARSEG_TO_OCC3D), FREE)).astype(np.uint8)
    rigs = -(-count // 6)
    each = 10  # rigs of one street
    for k in tqdm(range(rigs), "photographs of other worlds", unit="rig", leave=False):
        if k % each == 0:
            city = City([SEED_OFFSET + seed, 1 + k], 6.0, bool(k // each % 2), k // each % 7)
        t, rig = float(rng.uniform(0, 6)), calibration(rng, DRAWN)
        for row in (rig[camera] for camera in CAMERA_LAYOUT):
            image = photograph(city, t, np.array(row["camera_intrinsic"]), city.ego(t) @ matrix(row), DRAWN, rng, True)
            images.append(cv2.resize(image.color, (size, size), interpolation=cv2.INTER_AREA))
            classes.append(cv2.resize(names[image.semantic], (size, size), interpolation=cv2.INTER_NEAREST))
    return np.stack(images[:count]), np.stack(classes[:count])


class Lesson(nn.Module):
    """The two heads of pre-training over a PaliGemma's image tokens; words: {Occ3D class: token ids of each of its names}."""

    def __init__(self, vlm: nn.Module, words: dict[int, list[list[int]]]):
        super().__init__()
        host = vlm.model
        self.tower, self.projector = host.vision_tower, host.multi_modal_projector
        self.host, self.words = [host], words  # in a list: only what is named above learns as layers do
        width = host.config.text_config.hidden_size
        self.norm, self.draw = nn.LayerNorm(width), nn.Linear(width, CELLS**2 * (FREE + 1))
        self.scale = nn.Parameter(torch.tensor([8.0, -4.0]))  # of the cosine between token and word

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, s, s) in [-1, 1] -> class logits (n, p c, p c, 18) and word logits (n, p p, words)."""
        tokens = self.host[0].get_image_features(images).pooler_output  # (n, p p, C)
        side = round(tokens.shape[1] ** 0.5)
        maps = self.draw(self.norm(tokens)).unflatten(-1, (CELLS, CELLS, FREE + 1)).unflatten(1, (side, side))
        maps = maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (n, p, c, p c, K) -> (n, p c, p c, K)
        embed = self.host[0].language_model.embed_tokens
        device = tokens.device
        names = torch.stack([torch.cat([embed(torch.tensor(ids, device=device)) for ids in given]).mean(0) for given in self.words.values()])
        alike = F.normalize(tokens, dim=-1) @ F.normalize(names, dim=-1).t()
        return maps, self.scale[0] * alike + self.scale[1]


def pretrain(vlm: nn.Module, words: dict[int, list[list[int]]], images: np.ndarray, classes: np.ndarray, steps: int, patch: int,
             batch: int = 16, rate: float = 1e-2, word_rate: float = 2e-3) -> dict[str, float]:  # fmt: skip
    """Teaches `vlm` in place -> what it knows of the last tenth of the pictures, which only measures: the share of cells
    whose class is right, and of the commonest class."""
    step_px = patch // CELLS
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    truth = torch.from_numpy(classes)[:, step_px // 2 :: step_px, step_px // 2 :: step_px].long()  # (n, p c, p c)
    shown, lesson, rng = len(images) - max(1, len(images) // 10), Lesson(vlm, words).train(), np.random.default_rng(0)
    count = torch.bincount(truth[:shown].flatten(), minlength=FREE + 1).double().clamp_min(1) ** -0.5
    weight = (count / count.mean()).clamp_max(3).float()
    embedding = {"params": [vlm.model.language_model.embed_tokens.weight], "lr": word_rate, "base_lr": word_rate, "weight_decay": 0.0, "orthogonal": False}
    optimizer = Muon([*param_groups(lesson, rate, rate, 0.01, muon=True), embedding], lr=rate)
    for step in tqdm(range(steps), "tiny VLM", unit="step", leave=False):
        rows = torch.from_numpy(rng.integers(shown, size=batch))
        x, y = pixels[rows].float() / 127.5 - 1, truth[rows]
        if rng.random() < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        maps, named = lesson(x)
        patches = F.one_hot(y, FREE + 1).unflatten(1, (-1, CELLS)).unflatten(3, (-1, CELLS)).amax((2, 4)).flatten(1, 2)  # (n, p p, K)
        drawn = F.cross_entropy(maps.flatten(0, 2), y.flatten(), weight)
        called = F.binary_cross_entropy_with_logits(named, patches[..., list(words)].float(), reduction="none").sum(-1).mean()
        set_lr(optimizer, schedule(step, steps, "cosine", min(20, steps // 2)))
        optimizer.zero_grad()
        (drawn + called).backward()
        optimizer.step()
    right = 0
    with torch.no_grad():
        for rows in torch.arange(shown, len(images)).split(batch):
            right += int((lesson.eval()(pixels[rows].float() / 127.5 - 1)[0].argmax(-1) == truth[rows]).sum())
    kept = truth[shown:]
    return {"cells_right": right / kept.numel(), "commonest": float(torch.bincount(kept.flatten()).max() / kept.numel())}


def make_tinyvlm(out: Path | str, vlm: nn.Module, processor: Any, words: dict[int, list[list[int]]], steps: int, pictures: int = 2400) -> Path:
    """Pre-trains `vlm` and saves it with its processor in folder `out`, as transformers does, unless it is there. -> `out`.

    Raises InputError if `out` holds one of other settings.
    """
    out, vision = Path(out), vlm.config.vision_config
    wanted = {"steps": steps, "pictures": pictures, "image_size": vision.image_size, "patch": vision.patch_size,
              "width": vision.hidden_size, "layers": [vision.num_hidden_layers, vlm.config.text_config.num_hidden_layers]}  # fmt: skip
    if (out / "tinyvlm.json").is_file():
        found = read_json(out / "tinyvlm.json")
        if differ := [name for name in wanted if found.get(name) != wanted[name]]:
            raise InputError(f"{out}: a tiny VLM with another {', '.join(differ)}; choose another folder or delete it")
        return out
    known = pretrain(vlm, words, *make_pictures(pictures, vision.image_size), steps, vision.patch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        whole = Path(place) / "vlm"
        vlm.save_pretrained(whole)
        processor.save_pretrained(whole)
        write_json(whole / "tinyvlm.json", wanted | known)
        whole.rename(out)
    print(f"tiny VLM {out}: {pictures} photographs of other worlds, {steps} steps; {100 * known['cells_right']:.0f} % of the cells of "
          f"fresh ones have the right class ({100 * known['commonest']:.0f} % the commonest)")  # fmt: skip
    return out
