"""Trains the tiny CLIP, which stands for web pre-training where nothing may be downloaded.

    python -m data.tinyclip --out data/worlds/tinyclip                  # crops, captions, training: minutes
    python -m data.tinyclip --out data/worlds/tinyclip-unnamed --hide data/openset/rare.txt

How a CLIP is loaded and read: common/networks/tinyclip.py.

WHAT THE TINY CLIP SEES   Photographs, not labels: crops of streets of *other* worlds. Their seed differs from
    any world that is evaluated; nothing of a scene carries over. Each has a caption of kind, colour, size and
    shape. Colour is measured on the crop's pixels; size and shape on the object's parts (wheels, arms, tips,
    windows, riders), never on its kind. A word without a meaning is not in its vocabulary, as a real
    encoder's rare words nearly are. hide: kinds whose names are in no caption (their crops stay, with a
    generic word and attributes): the setting *name-unseen*. With nothing hidden it is *3D-unseen*: names are
    known from the web, only the 3D training lacks them.

It is trained on both readings, the class token and the mean of the patches.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.files import InputError, atomic, exit_on_input_error, read_json, read_npz, write_json, write_npz
from common.networks.tinyclip import (
    SEED_OFFSET,
    TEMPLATES,
    Clip,
    ensemble,
    load,
    normalise,
    read_both,
    read_words,
)
from common.nuscenes import LIDARSEG_TO_OCC3D, OCC3D_CLASSES
from common.train import Muon, schedule, set_lr

CROP = 32  # [px] of the tiny CLIP's images
OPENSET = Path(__file__).parent / "openset"
GENERIC = {  # nuScenes' own upper categories -> a word for any of their members
    "vehicle": "vehicle", "human": "human", "animal": "object", "movable_object": "object",
    "static_object": "object", "flat": "surface", "static": "structure",
}  # fmt: skip


# --- crops of other worlds ----------------------------------------------------------------------------------


def things():
    """lidarseg name -> function of a generator that makes such an object."""
    from data.driving import objects as o
    from data.driving.streets import CAR, LIDARSEG_NAMES, PEDESTRIAN

    grey = np.float32([0.35, 0.35, 0.35])
    makers = {
        CAR: o.car,
        o.BUS: o.bus,
        o.BENDY: lambda r: o.bus(r, o.BENDY),
        o.TRAILER: o.trailer,
        o.CONSTRUCTION: o.construction,
        o.BICYCLE: lambda r: o.bicycle(r, r.random() < 0.5),
        o.MOTORCYCLE: lambda r: o.motorcycle(r, r.random() < 0.5),
        PEDESTRIAN: o.pedestrian,
        o.CHILD: lambda r: o.pedestrian(r, o.CHILD),
        o.WORKER: lambda r: o.pedestrian(r, o.WORKER),
        o.STROLLER: o.stroller,
        o.CONE: o.cone,
        o.BARRIER: lambda r: o.barrier(r, grey * r.uniform(0.5, 2)),
        o.DEBRIS: o.debris,
        o.PUSHABLE: o.pushable,
        o.ANIMAL: o.dog,
        o.RACK: o.rack,
        LIDARSEG_NAMES.index("vehicle.truck"): o.truck,
    }
    return {LIDARSEG_NAMES[kind]: make for kind, make in makers.items()}


def shape_words(model) -> list[str]:
    """What an object's parts look like, whatever it is: 'with two wheels', 'with an arm', 'pointed', ..."""
    from data.render import BOX, BUS_BODY, CAR_CABIN, CYLINDER, ELLIPSOID, WHEEL

    p, words = model.parts, []
    wheels = int((p.material == WHEEL).sum())
    if wheels:
        words.append("with two wheels" if wheels == 2 else "with wheels")
    tilted = (np.abs(p.rotation[:, 2, 2]) < 0.995) & (p.kind == BOX)
    if (tilted & (p.half.max(1) > 1.0) & (p.half.min(1) < 0.3)).any():
        words.append("with an arm")
    if ((p.material == BUS_BODY) & (p.half[:, 0] > 2)).any():
        words.append("with many windows")
    elif (p.material == CAR_CABIN).any():
        words.append("with a cabin")
    elif wheels > 2:
        words.append("without windows")
    if ((p.kind == CYLINDER) & (p.taper[:, 0] > 0.6)).any():
        words.append("pointed")
    if (p.kind == ELLIPSOID).any():
        words.append("with a body" if (model.swing != 0).any() or wheels == 0 else "with a rider")
    return words


def size_words(size: tuple[float, float, float]) -> list[str]:
    """Length, width, height [m] -> words; thresholds ours."""
    length, width, height = max(size[:2]), min(size[:2]), size[2]
    words = ["small" if length < 2.2 else "medium" if length < 5.2 else "large"]
    if height > 2.4:
        words.append("tall")
    elif height < 1.2:
        words.append("low")
    if length > 6.5 and length > 2.5 * width:
        words.append("long")
    elif width < 0.6 < length:
        words.append("thin")
    return words


def colour_word(rgb: np.ndarray) -> str:
    """Mean colour (3,) in [0, 1] -> one of nine words."""
    import colorsys

    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, rgb))
    if value < 0.2:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.65 else "grey"
    if hue < 0.03 or hue > 0.92:
        return "red"
    if hue < 0.11:
        return "orange" if saturation > 0.55 and value > 0.35 else "brown"
    return "yellow" if hue < 0.18 else "green" if hue < 0.45 else "blue"


def make_crops(count: int, seed: int) -> tuple[np.ndarray, list[dict]]:
    """-> images (n, 32, 32, 3) uint8 and facts of each: {kind: lidarseg name, colour, words}, n about
    `count`, shuffled.

    Four tenths are single objects, each kind equally often, put into a street and looked at from somewhere;
    the rest are windows of what a car's cameras see, each class of a view equally often, named by what is in
    their middle.
    """
    from data.driving.city import City

    rng, cities, crops = np.random.default_rng([SEED_OFFSET + seed]), max(1, min(10, count // 300)), []
    with tqdm(total=count, desc="captioned crops", unit="crop", leave=False) as bar:
        for c in range(cities):
            city = City([SEED_OFFSET + seed, c], 2.0, bool(c % 2), c % 7)
            want = count * (c + 1) // cities - count * c // cities
            for crop in (
                *object_crops(city, 4 * want // 10, c, rng),
                *street_crops(city, want - 4 * want // 10, rng),
            ):
                crops.append(crop)
                bar.update()
    order = rng.permutation(len(crops))
    return np.stack([crops[k][0] for k in order]), [crops[k][1] for k in order]


def object_crops(city, count: int, first: int, rng: np.random.Generator):
    """Yields (image (32, 32, 3), fact) of `count` objects that stand where this street has room to see
    them.
    """
    from data.render import Primitives, camera_rays, corners, develop, draw, shade
    from data.driving.streets import LIDARSEG_NAMES, rot_z

    makers, scene, T = list(things().values()), city.scene(0.5), city.ego(0.5)
    made = tries = 0
    while made < count and tries < 6 * count:
        tries += 1
        model = makers[(made + first) % len(makers)](rng)
        x, y = T[:2, 3] + T[:2, :2] @ (rng.uniform(-30, 40), rng.uniform(-9, 9))
        z = float(city.ground.height([x], [y])[0])
        R = rot_z(rng.uniform(0, 2 * np.pi))
        parts = model.parts._replace(
            center=model.parts.center @ R.T + [x, y, z],
            rotation=R @ model.parts.rotation,
            instance=np.zeros(len(model.parts.kind), np.int32),
        )
        shown = scene._replace(
            primitives=Primitives.join([scene.primitives, parts]),
            corners=np.concatenate([scene.corners, corners(parts)]),
        )
        extent = max(model.size)
        distance, around = extent * rng.uniform(1.2, 4) + 3, rng.uniform(0, 2 * np.pi)
        eye = np.array(
            [x + distance * np.cos(around), y + distance * np.sin(around), z + rng.uniform(1.2, 1.9)]
        )
        focal = CROP * distance / extent * rng.uniform(0.6, 1.6)
        K = np.array([[focal, 0, CROP / 2], [0, focal, CROP / 2], [0, 0, 1]])
        grid = camera_rays(K, _look(eye, np.array([x, y, z + model.size[2] / 2])), (CROP, CROP))
        view = draw(shown, grid)
        mask = view.ids >= len(scene.primitives.kind)
        if mask.mean() < 0.08:  # behind something
            continue
        color = develop(
            shade(shown, grid, view), shown.light.exposure, rng, gain=float(rng.uniform(0.9, 1.1))
        )
        words = size_words(model.size) + shape_words(model)
        colour = colour_word(color[mask].mean(0) / 255)
        yield color, {"kind": LIDARSEG_NAMES[model.semantic], "colour": colour, "words": words}
        made += 1


def street_crops(city, count: int, rng: np.random.Generator, each: int = 3):
    """Yields (image (32, 32, 3), fact) of `count` windows of camera views: `each` of every class that a view
    shows.
    """
    import cv2

    from data.driving.sensors import CAMERA_LAYOUT, calibration, matrix, photograph
    from data.driving.streets import LIDARSEG_NAMES

    shape, made = (224, 400), 0
    while made < count:
        row, t = calibration(rng, shape)[str(rng.choice(list(CAMERA_LAYOUT)))], float(rng.uniform(0, 2))
        image = photograph(
            city, t, np.array(row["camera_intrinsic"]), city.ego(t) @ matrix(row), shape, rng, True
        )
        for kind in np.unique(image.semantic[image.semantic < len(LIDARSEG_NAMES)]):
            places = np.argwhere(image.semantic == kind)
            for v, u in places[rng.integers(len(places), size=each)]:
                side = int(rng.choice([20, 32, 32, 52]))
                top, left = (int(np.clip(m - side // 2, 0, n - side)) for m, n in zip((v, u), shape))
                window = np.s_[top : top + side, left : left + side]
                mask, words = image.semantic[window] == kind, []
                if image.instance[v, u]:
                    mask = image.instance[window] == image.instance[v, u]
                    model = city.actors[image.instance[v, u] - 1].model
                    words = size_words(model.size) + shape_words(model)
                if mask.mean() < 0.3 or made == count:
                    continue
                color = image.color[window]
                how, colour = cv2.INTER_AREA if side > CROP else cv2.INTER_LINEAR, color[mask].mean(0) / 255
                fact = {"kind": LIDARSEG_NAMES[kind], "colour": colour_word(colour), "words": words}
                yield cv2.resize(color, (CROP, CROP), interpolation=how), fact
                made += 1


def _look(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """T_world_cam (4, 4) of a level camera at eye that looks at target."""
    z = (target - eye) / np.linalg.norm(target - eye)
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    T = np.eye(4)
    T[:3, 0], T[:3, 1], T[:3, 2], T[:3, 3] = x, np.cross(z, x), z, eye
    return T


def caption(
    fact: dict, hidden: tuple[str, ...], vocabulary: dict[str, list[str]], rng: np.random.Generator
) -> str:
    """One sentence about a crop: a random part of what is true of it. Kinds in `hidden` are never named."""
    from data.driving.streets import ID

    kind = fact["kind"]
    name = OCC3D_CLASSES[LIDARSEG_TO_OCC3D[ID[kind]]]
    before = [w for w in fact["words"] if " " not in w and rng.random() < 0.6]
    after = [w for w in fact["words"] if " " in w and rng.random() < 0.7]
    if rng.random() < 0.7:
        before.append(fact["colour"])
    word = GENERIC[kind.split(".")[0]]
    if name not in hidden and rng.random() < 0.85:
        words = vocabulary[name]
        own = [w for w in words if w in kind.replace("_", " ").replace("trafficcone", "traffic cone")]
        word = str(rng.choice(own or words))
    return TEMPLATES[rng.integers(5)].format(" ".join([*before, word, *after]))


# --- training -----------------------------------------------------------------------------------------------


def make_tokenizer(words: set[str]):
    """A word-level tokenizer: lower case, punctuation apart, <unk> for all other words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<start>", "<unk>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", None, [("<start>", 1), ("<end>", 3)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_model(words: int, dim: int = 64):
    """An untrained CLIPModel of about half a million parameters."""
    from transformers import CLIPConfig, CLIPModel

    heads, special = {"num_attention_heads": 4}, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": words}
    text |= {"max_position_embeddings": 32, "projection_dim": dim} | heads | special
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "image_size": CROP}
    vision |= {"patch_size": 8, "projection_dim": dim} | heads
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))


def contrast(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss; same (n, n) bool: pairs with an equal caption, which are no negatives of each
    other.
    """
    logits = scale * images @ texts.t()
    target = same.float() / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target))


def train(
    images: np.ndarray, facts: list[dict], hidden: tuple[str, ...], seed: int, steps: int, batch: int = 64
):
    """-> (model, tokenizer, [loss of each step]). First `steps` / 4 steps of text alone (two captions of one
    crop belong together), then all, the text at a tenth of the rate: captions lie apart before pixels meet
    them, and stay so. Measured on 2500 crops and 300 steps of AdamW: 44 % of fresh crops get the right name,
    28 % without the two. With 5000 crops and 700 steps AdamW names 41 % by the whole crop and 43 % by its
    patches, Muon (for the layers' matrices) 56 and 57 %."""
    vocabulary, rng = read_words(OPENSET / "vocabulary.txt"), np.random.default_rng([seed, 1])
    some = [caption(fact, hidden, vocabulary, rng) for fact in facts for _ in range(12)]
    tokenizer = make_tokenizer(set(re.findall(r"[a-z0-9]+|[.,]", " ".join([*some, *TEMPLATES]).lower())))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny_model(len(tokenizer))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    of_text = [p for name, p in model.named_parameters() if name.startswith("text")]
    of_images = [p for name, p in model.named_parameters() if not name.startswith("text")]
    content = np.array([str(fact) for fact in facts])
    losses = []

    def speak(rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        texts = [caption(facts[k], hidden, vocabulary, rng) for k in rows]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        out = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(getattr(out, "pooler_output", out), dim=-1), np.array(texts)

    def match_texts() -> Tensor:
        rows = rng.choice(len(facts), min(2 * batch, len(facts)), replace=False)
        same = torch.from_numpy(content[rows][:, None] == content[rows][None])
        return contrast(speak(rows)[0], speak(rows)[0], same, torch.tensor(10.0))

    def match_images() -> Tensor:
        rows = rng.choice(len(images), min(batch, len(images)), replace=False)
        text, words = speak(rows)
        crops = pixels[torch.from_numpy(rows)]
        crops = torch.where(
            torch.from_numpy(rng.random(len(rows)) < 0.5).view(-1, 1, 1, 1), crops.flip(-1), crops
        )
        crops = (crops * torch.from_numpy(rng.uniform(0.8, 1.2, (len(rows), 1, 1, 1))).float()).clamp(0, 1)
        whole, patches = read_both(model, normalise(crops))
        same, scale = torch.from_numpy(words[:, None] == words[None]), model.logit_scale.exp().clamp(max=100)
        return contrast(whole, text, same, scale) + contrast(
            F.normalize(patches.mean(1), dim=-1), text, same, scale
        )

    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    inner = lambda p: p.ndim > 1 and not any(p is table for table in tables)  # noqa: E731
    for count, rates, match in ((steps // 4, (1e-2, 0.0), match_texts), (steps, (1e-3, 1e-2), match_images)):
        groups = [
            {"params": [p for p in part if inner(p) == matrices], "orthogonal": matrices, "base_lr": rate}
            for part, rate in zip((of_text, of_images), rates, strict=True)
            for matrices in (False, True)
        ]
        optimizer = Muon(groups, lr=1.0, weight_decay=0.05, betas=(0.9, 0.98))
        losses = []
        for step in tqdm(range(count), "tiny CLIP", unit="step", leave=False):
            set_lr(optimizer, schedule(step, count, "cosine", warmup=count // 10))
            loss = match()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model.eval(), tokenizer, losses


def make_tinyclip(
    out: Path | str, hidden: tuple[str, ...] = (), seed: int = 0, crops: int = 5000, steps: int = 900
) -> Path:
    """Trains the tiny CLIP into folder `out` unless it is there; the crops lie beside it and are shared. ->
    `out`.

    hidden: Occ3D classes that no caption names. Raises InputError if `out` holds one of other settings.
    """
    out, wanted = Path(out), {"hidden": sorted(hidden), "seed": seed, "crops": crops, "steps": steps}
    path = out / "tinyclip.json"
    if path.is_file():
        found = read_json(path)
        if differ := [name for name in wanted if found.get(name) != wanted[name]]:
            raise InputError(
                f"{out}: a tiny CLIP with another {', '.join(differ)}; choose another folder or delete it"
            )
        return out
    store = out.parent / f"tinyclip-crops-{crops}-seed{seed}.npz"
    if store.is_file() and store.with_suffix(".json").is_file():
        images, facts = (
            read_npz(store, {"images": (None, "uint8")})["images"],
            read_json(store.with_suffix(".json")),
        )
    else:
        images, facts = make_crops(crops, seed)
        write_npz(store, images=images)
        write_json(store.with_suffix(".json"), facts, indent=None)
    shown = len(images) - len(images) // 10  # the last tenth (they are shuffled) only measures
    model, tokenizer, losses = train(images[:shown], facts[:shown], tuple(hidden), seed, steps)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    with atomic(out / "tokenizer.json") as temporary:
        tokenizer.backend_tokenizer.save(str(temporary))
    tokenizer.save_pretrained(out)
    share = matching(load(out), images[shown:], facts[shown:])
    write_json(
        path, wanted | {"images": len(images), "loss": losses[-1], "kind_accuracy": share}
    )  # last: now it is whole
    whole, patches, chance = (f"{100 * share[name]:.0f} %" for name in ("whole", "patches", "chance"))
    print(
        f"tiny CLIP {out}: {len(images)} crops, {steps} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}; "
        f"names the kind of {whole} of fresh crops ({patches} by patches, {chance} the most frequent)"
    )
    return out


def matching(clip: Clip, images: np.ndarray, facts: list[dict]) -> dict[str, float]:
    """Share of crops whose nearest class prompt is the right one, by the class token and by the patches'
    mean.
    """
    from data.driving.streets import ID

    vocabulary = read_words(OPENSET / "vocabulary.txt")
    text = torch.stack([ensemble(clip, words) for words in vocabulary.values()])
    truth = torch.tensor(
        [list(vocabulary).index(OCC3D_CLASSES[LIDARSEG_TO_OCC3D[ID[fact["kind"]]]]) for fact in facts]
    )
    with torch.inference_mode():
        whole, patches = read_both(
            clip.model, normalise(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        )
    guess = {"whole": whole @ text.t(), "patches": patches.mean(1) @ text.t()}
    result = {name: float((scores.argmax(1) == truth).float().mean()) for name, scores in guess.items()}
    return result | {"chance": float(torch.bincount(truth).max() / len(truth))}


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.tinyclip", description="Train the tiny CLIP on crops of other worlds."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--hide", type=Path, help="file of held-out kinds (data/openset/*.txt) that captions never name"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crops", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args(argv)
    hidden = tuple(read_words(args.hide)) if args.hide else ()
    make_tinyclip(args.out, hidden, args.seed, args.crops, args.steps)


if __name__ == "__main__":
    main()
