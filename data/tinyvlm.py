"""Teaches a tiny PaliGemma 2 to see. It stands for pre-trained weights where nothing may be downloaded.

    folder = make_tinyvlm("data/worlds/tinyvlm", vlm, processor, answer_loss, steps)    # minutes, once

The network: common/networks/tinyvlm.py.

WHAT IT IS TAUGHT   What PaliGemma 2 has learned long before it drives (its pre-training has segmentation,
    detection and questions about pictures), in two lessons over single photographs.
    Seeing: two heads read the image tokens as the language model gets them. One draws a class map of a
    quarter patch's cells. One compares each token with the embeddings of the words for what can be asked for.
    Vision tower, projector and those embeddings learn. Answering, beside it in the second half of the steps:
    is there such a thing in the picture, and how many. All parts learn. Depth, height, direction, motion and
    a second camera are left to the method.

WHAT IT SEES   Photographs by a car's six cameras, one at a time, in streets of *other* worlds. Their seed
    differs from any world that is trained or evaluated on. No scene, object or calibration carries over.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.files import InputError, atomic, read_json, write_json
from common.nuscenes import FREE, LIDARSEG_TO_OCC3D
from common.questions import CLASSES, MOST, PHRASES, WORDINGS, words
from common.train import Muon, param_groups, schedule, set_apart, set_lr
from common.networks.tinyclip import SEED_OFFSET

CELLS = 4  # cells per side of a patch in the class map
SEEN = 20  # [px] of a photograph that an object must show to be counted
NAMES = {
    c: [words(PHRASES.index(("", name)), plural) for plural in (False, True)]
    for c, name in enumerate(CLASSES, 1)
}  # Occ3D id: what, whats
DRAWN = (144, 256)  # [px] rows, columns of the photographs before they are squeezed to the model's square


class Pictures(NamedTuple):
    """n photographs and what is in them."""

    images: np.ndarray  # (n, s, s, 3) uint8
    classes: np.ndarray  # (n, s, s) uint8 Occ3D class, sky: 17
    counts: (
        np.ndarray
    )  # (n, 11) uint8 how many of each detection class (Occ3D ids 1 to 10) show at least `SEEN` pixels


def make_pictures(count: int, size: int, seed: int = 0) -> Pictures:
    """`count` photographs of size x size px, a rig's six after another."""
    import cv2

    from data.driving.city import City
    from data.driving.sensors import CAMERA_LAYOUT, calibration, matrix, photograph

    rng, images, classes, counts = np.random.default_rng([SEED_OFFSET + seed, 1]), [], [], []
    names = np.append(LIDARSEG_TO_OCC3D, np.full(256 - len(LIDARSEG_TO_OCC3D), FREE)).astype(np.uint8)
    rigs = -(-count // 6)
    each = 10  # rigs of one street
    for k in tqdm(range(rigs), "photographs of other worlds", unit="rig", leave=False):
        if k % each == 0:
            city = City([SEED_OFFSET + seed, 1 + k], 6.0, bool(k // each % 2), k // each % 7)
        t, rig = float(rng.uniform(0, 6)), calibration(rng, DRAWN)
        for row in (rig[camera] for camera in CAMERA_LAYOUT):
            image = photograph(
                city, t, np.array(row["camera_intrinsic"]), city.ego(t) @ matrix(row), DRAWN, rng, True
            )
            images.append(cv2.resize(image.color, (size, size), interpolation=cv2.INTER_AREA))
            classes.append(cv2.resize(names[image.semantic], (size, size), interpolation=cv2.INTER_NEAREST))
            both = names[image.semantic].astype(np.int64) << 16 | image.instance
            shown, pixels = np.unique(both[image.instance > 0], return_counts=True)
            kinds = shown[pixels >= SEEN] >> 16
            counts.append(np.bincount(kinds[(kinds > 0) & (kinds < 11)], minlength=11))
    return Pictures(
        np.stack(images[:count]), np.stack(classes[:count]), np.stack(counts[:count]).astype(np.uint8)
    )


def picture_questions(
    counts: np.ndarray, rng: np.random.Generator, existing: int = 4, counted: int = 2
) -> list[tuple[str, str]]:
    """counts (11,) -> questions about one picture and their answers: yes as often as no where both can be
    asked, and counts of things that are mostly there."""
    there, missing = np.flatnonzero(counts[1:]), np.flatnonzero(counts[1:] == 0)
    asked = []
    for k in range(existing + counted):
        some = (
            there
            if len(there) and (rng.random() < (0.5 if k < existing else 0.8) or not len(missing))
            else missing
        )
        kind = 1 + int(rng.choice(some))
        (what, whats), number = NAMES[kind], int(counts[kind])
        wording = WORDINGS["any" if k < existing else "number"]
        answer = ("yes" if number else "no") if k < existing else str(min(number, MOST))
        asked.append((wording[rng.integers(len(wording))].format(what=what, whats=whats), answer))
    return asked


class Seeing(nn.Module):
    """The two heads of the first lesson over a PaliGemma's image tokens; names: {Occ3D class: token ids of
    each of its words}.
    """

    def __init__(self, vlm: nn.Module, names: dict[int, list[list[int]]]):
        super().__init__()
        self.vlm, self.names = vlm, names
        width = vlm.config.text_config.hidden_size
        self.norm, self.draw = nn.LayerNorm(width), nn.Linear(width, CELLS**2 * (FREE + 1))
        self.scale = nn.Parameter(torch.tensor([8.0, -4.0]))  # of the cosine between token and word

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, s, s) in [-1, 1] -> class logits (n, p c, p c, 18) and word logits (n, p p, words)."""
        tokens = self.vlm.model.get_image_features(images).pooler_output  # (n, p p, C)
        side = round(tokens.shape[1] ** 0.5)
        maps = self.draw(self.norm(tokens)).unflatten(-1, (CELLS, CELLS, FREE + 1)).unflatten(1, (side, side))
        maps = maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (n, p, p, c, c, K) -> (n, p c, p c, K)
        embed = self.vlm.model.language_model.embed_tokens
        called = [
            torch.cat([embed(torch.tensor(ids, device=tokens.device)) for ids in given]).mean(0)
            for given in self.names.values()
        ]
        alike = F.normalize(tokens, dim=-1) @ F.normalize(torch.stack(called), dim=-1).t()
        return maps, self.scale[0] * alike + self.scale[1]


def cells_of(classes: np.ndarray, patch: int) -> Tensor:
    """(n, s, s) classes of pixels -> (n, p c, p c) int64, those in the middle of the cells."""
    px = patch // CELLS
    return torch.from_numpy(classes)[:, px // 2 :: px, px // 2 :: px].long()


def seeing_loss(seeing: Seeing, images: Tensor, cells: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of the drawn classes, and of which words each patch deserves."""
    maps, called = seeing(images)
    patches = (
        F.one_hot(cells, FREE + 1)
        .unflatten(1, (-1, CELLS))
        .unflatten(3, (-1, CELLS))
        .amax((2, 4))
        .flatten(1, 2)
    )  # (n, p p, K)
    wanted = patches[..., list(seeing.names)].float()
    drawn = F.cross_entropy(maps.flatten(0, 2), cells.flatten(), weight)
    return drawn + F.binary_cross_entropy_with_logits(called, wanted, reduction="none").sum(-1).mean()


AnswerLoss = Callable[
    [Tensor, list[list[tuple[str, str]]]], tuple[Tensor, float]
]  # images, questions -> loss, share right


def pretrain(
    vlm: nn.Module,
    names: dict[int, list[list[int]]],
    answer_loss: AnswerLoss,
    pictures: Pictures,
    steps: int,
    batch: int = 16,
    rate: float = 1e-2,
    word_rate: float = 2e-3,
) -> dict[str, float]:
    """Teaches `vlm` in place -> what it knows of the last tenth of the pictures, which only measures: the
    share of cells whose class is right, that of the commonest class, and the share of answers that are right.

    answer_loss: images (n, 3, s, s) in [0, 1] and each one's questions with answers -> the loss, and the
    share it has right.
    """
    pixels, cells = (
        torch.from_numpy(pictures.images).permute(0, 3, 1, 2),
        cells_of(pictures.classes, vlm.config.vision_config.patch_size),
    )
    shown, seeing, rng = (
        len(pixels) - max(1, len(pixels) // 10),
        Seeing(vlm, names).train(),
        np.random.default_rng(0),
    )
    count = torch.bincount(cells[:shown].flatten(), minlength=FREE + 1).double().clamp_min(1) ** -0.5
    weight = (count / count.mean()).clamp_max(3).float()
    groups = param_groups(seeing, rate, rate, 0.01, muon=True)
    set_apart(
        groups,
        [vlm.get_input_embeddings().weight],
        lr=word_rate,
        base_lr=word_rate,
        weight_decay=0.0,
        orthogonal=False,
    )
    optimizer = Muon([group for group in groups if group["params"]], lr=rate)

    def asked(rows: Tensor, rng: np.random.Generator) -> list[list[tuple[str, str]]]:
        return [picture_questions(pictures.counts[row], rng) for row in rows.tolist()]

    for step in tqdm(range(steps), "tiny VLM", unit="step", leave=False):
        rows = torch.from_numpy(rng.integers(shown, size=batch))
        x, y = pixels[rows].float() / 255, cells[rows]
        if rng.random() < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        loss = seeing_loss(seeing, 2 * x - 1, y, weight)
        if 2 * step >= steps:
            loss = loss + answer_loss(x, asked(rows, rng))[0]
        set_lr(optimizer, schedule(step, steps, "cosine", min(20, steps // 2)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(seeing.parameters(), 5.0)
        optimizer.step()
    right, answered, rest, fixed = 0, [], torch.arange(shown, len(pixels)), np.random.default_rng(1)
    with torch.no_grad():
        for rows in rest.split(batch):
            x = pixels[rows].float() / 255
            right += int((seeing.eval()(2 * x - 1)[0].argmax(-1) == cells[rows]).sum())
            answered += [answer_loss(x, asked(rows, fixed))[1]] * len(rows)
    kept = cells[shown:]
    commonest = float(torch.bincount(kept.flatten()).max() / kept.numel())
    cells_right, answers_right = right / kept.numel(), float(np.mean(answered))
    return {"cells_right": cells_right, "commonest": commonest, "answers_right": answers_right}


def sizes(vlm: nn.Module) -> tuple[int, int, int, int, int]:
    """Image and patch [px], width, layers of the vision tower and of the language model."""
    vision, text = vlm.config.vision_config, vlm.config.text_config
    return (
        vision.image_size,
        vision.patch_size,
        vision.hidden_size,
        vision.num_hidden_layers,
        text.num_hidden_layers,
    )


def make_tinyvlm(
    out: Path | str, vlm: nn.Module, processor: Any, answer_loss: AnswerLoss, steps: int, pictures: int = 2400
) -> Path:
    """Pre-trains `vlm` and saves it with its processor in folder `out`, as transformers does, unless it is
    there. -> `out`.

    Raises InputError if `out` holds one of other settings.
    """
    image, patch, width, *layers = sizes(vlm)
    out, wanted = (
        Path(out),
        {
            "steps": steps,
            "pictures": pictures,
            "image_size": image,
            "patch": patch,
            "width": width,
            "layers": layers,
        },
    )
    if (out / "tinyvlm.json").is_file():
        found = read_json(out / "tinyvlm.json")
        if differ := [name for name in wanted if found.get(name) != wanted[name]]:
            raise InputError(
                f"{out}: a tiny VLM with another {', '.join(differ)}; choose another folder or delete it"
            )
        return out
    tokens = partial(processor.tokenizer.encode, add_special_tokens=False)
    names = {c: [tokens(f" {name}") for name in both] for c, both in NAMES.items()}
    known = pretrain(vlm, names, answer_loss, make_pictures(pictures, image), steps)
    try:
        with atomic(out, folder=True) as whole:
            vlm.save_pretrained(whole)
            processor.save_pretrained(whole)
            write_json(whole / "tinyvlm.json", wanted | known)
    except OSError:  # another process made the same at the same time
        if not (out / "tinyvlm.json").is_file():
            raise
    cells, commonest, answers = (f"{100 * share:.0f} %" for share in known.values())
    print(
        f"tiny VLM {out}: {pictures} photographs of other worlds, {steps} steps; {cells} of the cells "
        f"of fresh ones have the right class ({commonest} the commonest), {answers} of answers are right"
    )
    return out
