"""Teaches a tiny PaliGemma 2 to see. It stands for pre-trained weights where nothing may be downloaded.

    folder = make_tinyvlm("data/worlds/tinyvlm", vlm, processor, answer_loss, steps)    # minutes, once

The network: common/networks/tinyvlm.py. Its vision tower starts as the miniature foundation (common/weights).

WHAT IT IS TAUGHT   What PaliGemma 2 has learned long before it drives (its pre-training has segmentation,
    detection and questions about pictures), in two lessons over single photographs.
    Seeing: heads read the vision tower's tokens. Of each token they say how many objects of each class have
    their middle there, where the largest one's is and how large it looks, and the shares of the classes;
    from street-depth (a ceiling) the mean depth, too. The neck learns; the foundation stays.
    Answering, over the frozen tokens: is there such a thing in the picture, and how many. Projector and
    language model learn. Distance, direction, motion and a second camera are left to the method.

WHAT IT SEES   The miniature foundation's photographs (data/foundation.py): streets of *other* worlds, whose
    seed differs from any world that is trained or evaluated on. No scene, object or calibration carries over.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.files import InputError, atomic, read_json, write_json
from common.networks.street import WEIGHTS, load_street
from common.networks.tinyvlm import TOKEN, StreetTower, save_weights
from common.nuscenes import FREE
from common.questions import CLASSES, MOST, PHRASES, WORDINGS, words
from common.train import Muon, param_groups, schedule, set_apart, set_lr
from data.foundation import KEPT, OCC3D_ID, Pictures, load_pictures

NAMES = {
    c: [words(PHRASES.index(("", name)), plural) for plural in (False, True)]
    for c, name in enumerate(CLASSES, 1)
}  # Occ3D id: what, whats
RIGS = 400  # cars whose six photographs are learned from
AnswerLoss = Callable[
    [Tensor, list[list[tuple[str, str]]]], tuple[Tensor, float]
]  # images or what the tower sees, questions -> loss, share right


def count_objects(pictures: Pictures) -> np.ndarray:
    """-> (n, 11) uint8: how many of each detection class (Occ3D ids 1 to 10) a picture shows."""
    counts = np.zeros((len(pictures.images), 11), np.uint8)
    for picture, kind in pictures.objects[:, :2].astype(int):
        if 1 <= kind <= 10:
            counts[picture, kind] += 1
    return counts


def picture_questions(
    counts: np.ndarray, rng: np.random.Generator, existing: int = 8, counted: int = 4
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


def token_targets(pictures: Pictures, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each token shows: objects of each class (n, p, p, 10) 0, 1 or 2 for more; middle and size of the
    largest (n, p, p, 10, 4); shares of the classes (n, p, p, 18); mean log depth (n, p, p), nan: sky.

    Middle: offset from the token's in tokens; size: log of tokens.
    """
    n, (high, wide) = len(pictures.images), KEPT
    count, box = torch.zeros(n, side, side, 10, dtype=torch.int64), torch.zeros(n, side, side, 10, 4)
    for picture, kind, u, v, du, dv in sorted(pictures.objects.tolist(), key=lambda row: row[4] * row[5]):
        if 1 <= kind <= 10:
            x, y, k = u / wide * side, v / high * side, int(kind) - 1
            place = int(picture), min(side - 1, int(y)), min(side - 1, int(x)), k
            count[place] += 1
            size = np.log([du / wide * side, dv / high * side])
            box[place] = torch.tensor([x - place[2] - 0.5, y - place[1] - 0.5, *size])
    ids = torch.from_numpy(OCC3D_ID[pictures.classes]).long()
    maps = F.one_hot(ids, FREE + 1).float().permute(0, 3, 1, 2)
    depth = torch.from_numpy(pictures.depth).float()
    depth = torch.stack([depth.clamp_min(0.1).log() * (depth > 0), (depth > 0).float()], 1)
    depth = F.adaptive_avg_pool2d(depth, side)
    return (count.clamp_max(2), box, F.adaptive_avg_pool2d(maps, side).permute(0, 2, 3, 1),
            torch.where(depth[:, 1] > 0.2, depth[:, 0] / depth[:, 1], torch.nan))


class Seeing(nn.Module):
    """The heads of the first lesson over a vision tower's tokens."""

    def __init__(self, tower: StreetTower):
        super().__init__()
        self.tower, self.read = tower, nn.Linear(TOKEN, 30 + 40 + FREE + 1 + 1)

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(n, C, h, w) of the encoder -> logits of 0, 1, 2 objects (n, p, p, 10, 3), boxes (n, p, p, 10, 4),
        logits of the classes (n, p, p, 18), log depth (n, p, p)."""
        count, box, shares, depth = self.read(self.tower.tokens(cells)).split([30, 40, FREE + 1, 1], -1)
        return count.unflatten(-1, (10, 3)), box.unflatten(-1, (10, 4)), shares, depth[..., 0]


def seeing_loss(found: tuple[Tensor, ...], targets: tuple[Tensor, ...], depth: bool) -> Tensor:
    """The sum of the heads' losses; tokens with objects count double."""
    (count, box, shares, far), (number, true_box, true_shares, true_far) = found, targets
    weight = count.new_tensor([1.0, 2.0, 2.0])
    loss = F.cross_entropy(count.flatten(0, 3), number.flatten(), weight, reduction="sum") / len(count) / 10
    there = (number > 0)[..., None]
    loss = loss + 0.5 * ((box - true_box).abs() * there).sum() / there.sum().clamp_min(1)
    loss = loss - (true_shares * shares.log_softmax(-1)).sum(-1).mean()
    if depth:
        known = ~true_far.isnan()
        loss = loss + (far - true_far)[known].abs().sum() / known.sum().clamp_min(1)
    return loss


def learn_to_see(tower: StreetTower, pictures: Pictures, steps: int, depth: bool = False, batch: int = 16,
                 rate: float = 1e-2) -> dict[str, float]:
    """Lesson 1, in place -> of the last tenth of the pictures, which only measures: recall and precision of
    classes in tokens."""
    rng, shown = np.random.default_rng(0), len(pictures.images) - max(1, len(pictures.images) // 10)
    seeing, pixels = Seeing(tower.eval()), torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    tower.encoder.requires_grad_(False)
    cells = torch.cat([tower.cells(x.float() / 127.5 - 1).half() for x in pixels.split(16)])
    targets = token_targets(pictures, tower.side)
    groups = param_groups(nn.ModuleList([tower.neck, seeing.read]), rate, rate, 0.01, muon=True)
    optimizer = Muon(groups, lr=rate)
    for step in tqdm(range(steps), "tiny VLM: seeing", unit="step", leave=False):
        rows = torch.from_numpy(rng.integers(shown, size=batch))
        x, wanted = cells[rows].float(), [t[rows] for t in targets]
        if rng.random() < 0.5:
            x, wanted = x.flip(-1), [t.flip(2) for t in wanted]
            wanted[1] = wanted[1] * torch.tensor([-1.0, 1, 1, 1])
        set_lr(optimizer, schedule(step, steps, "cosine", min(20, steps // 2)))
        optimizer.zero_grad()
        loss = seeing_loss(seeing(x), wanted, depth)
        loss.backward()
        nn.utils.clip_grad_norm_(seeing.parameters(), 5.0)
        optimizer.step()
    hit = torch.zeros(3)
    with torch.no_grad():
        for rows in torch.arange(shown, len(pixels)).split(batch):
            said = seeing(cells[rows].float())[0].argmax(-1) > 0
            true = targets[0][rows] > 0
            hit += torch.stack([(said & true).sum(), true.sum(), said.sum()])
    return {"recall": float(hit[0] / hit[1]), "precision": float(hit[0] / hit[2].clamp_min(1))}


def learn_to_answer(vlm: nn.Module, answer_loss: AnswerLoss, pictures: Pictures, steps: int, batch: int = 16,
                    rate: float = 5e-3, word_rate: float = 2e-3) -> float:
    """Lesson 2, in place, over what the frozen tower sees -> the share of answers that are right for the last
    tenth of the pictures, which only measures."""
    rng, fixed, counts = np.random.default_rng(0), np.random.default_rng(1), count_objects(pictures)
    pixels, tower = torch.from_numpy(pictures.images).permute(0, 3, 1, 2), vlm.model.vision_tower.eval()
    with torch.no_grad():
        seen = torch.cat([tower(x.float() / 127.5 - 1).last_hidden_state.half() for x in pixels.split(60)])
    shown, model = len(seen) - max(1, len(seen) // 10), vlm.model
    learning = nn.ModuleList([model.language_model, vlm.lm_head, model.multi_modal_projector])
    groups = param_groups(learning, rate, rate, 0.01, muon=True)
    set_apart(groups, [vlm.get_input_embeddings().weight], lr=word_rate, base_lr=word_rate, weight_decay=0.0,
              orthogonal=False)
    optimizer = Muon([group for group in groups if group["params"]], lr=rate)

    def asked(rows: Tensor, rng: np.random.Generator) -> list[list[tuple[str, str]]]:
        return [picture_questions(counts[row], rng) for row in rows.tolist()]

    for step in tqdm(range(steps), "tiny VLM: answering", unit="step", leave=False):
        rows = torch.from_numpy(rng.integers(shown, size=batch))
        loss = answer_loss(seen[rows, None], asked(rows, rng))[0]
        set_lr(optimizer, schedule(step, steps, "cosine", min(20, steps // 2)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        rest = torch.arange(shown, len(seen)).split(8)
        shares = [answer_loss(seen[rows, None], asked(rows, fixed))[1] for rows in rest]
    return float(np.mean(shares))


def make_tinyvlm(
    out: Path | str, vlm: nn.Module, processor: Any, answer_loss: AnswerLoss, steps: int,
    start: str = "street", pictures: Pictures | None = None
) -> Path:
    """Pre-trains `vlm` and saves it with its processor in folder `out`, unless it is there. -> `out`.

    steps: of the first lesson; the second has a quarter as many. start: of the tower's encoder, conv
    (random), street or street-depth. pictures: default the miniature foundation's, beside `out`. Raises
    InputError if `out` holds one of other settings.
    """
    tower, text = vlm.model.vision_tower, vlm.config.text_config
    out, wanted = Path(out), {"steps": steps, "side": tower.side, "width": text.hidden_size,
                              "layers": text.num_hidden_layers, "start": start}
    if start != "conv":
        wanted["foundation"] = read_json(WEIGHTS / f"{start}.json")["commit"]
    if (out / "tinyvlm.json").is_file():
        found = read_json(out / "tinyvlm.json")
        if differ := [name for name in wanted if found.get(name) != wanted[name]]:
            raise InputError(
                f"{out}: a tiny VLM with another {', '.join(differ)}; choose another folder or delete it"
            )
        return out
    pictures = load_pictures(out.parent / "foundation", RIGS, 0) if pictures is None else pictures
    if start != "conv":
        tower.encoder.load_state_dict(load_street(start).backbone.state_dict())
    known = learn_to_see(tower, pictures, steps, depth=start == "street-depth")
    known["answers_right"] = learn_to_answer(vlm, answer_loss, pictures, steps // 4)
    try:
        with atomic(out, folder=True) as whole:
            vlm.config.save_pretrained(whole)
            processor.save_pretrained(whole)
            save_weights(vlm, whole)
            write_json(whole / "tinyvlm.json", wanted | known)
    except OSError:  # another process made the same at the same time
        if not (out / "tinyvlm.json").is_file():
            raise
    recall, precision, answers = (f"{100 * share:.0f} %" for share in known.values())
    print(f"tiny VLM {out}: {len(pictures.images)} photographs of other worlds, {steps} and {steps // 4} "
          f"steps; of fresh ones {recall} of the things are found where they are, {precision} of those found "
          f"are there; {answers} of answers are right")
    return out
