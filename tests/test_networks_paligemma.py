"""PaliGemma as a host: transformers' own numbers, packed exchanges, generation, scoring, bad folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.networks import paligemma as P
from common.nuscenes import CAMERAS
from common.questions import ANSWERS, sentences

QUESTIONS = ("Are there any parked cars to the front left of me?", "How many pedestrians are there?",
             "What is the status of the bus?")
SIZES = P.SIZES["toy"][0]
ONE = torch.zeros(1, dtype=torch.int64)


def host(prefix: str = "image", seed: int = 0) -> P.PaliGemma:
    torch.manual_seed(seed)
    return P.PaliGemma(P.random_host(SIZES, sentences()), len(CAMERAS), prefix).eval()


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 6, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def exchanges(vlm: P.PaliGemma, answers=("yes", "3", "parked")) -> list[P.Exchange]:
    return [vlm.exchange(q, a) for q, a in zip(QUESTIONS, answers)]


def loss(vlm: P.PaliGemma, last: torch.Tensor, packs: torch.Tensor) -> float:
    return vlm.token_losses(P.States(last, 0, None, None, None), packs, P.QA)[0].mean().item()


def processed(vlm: P.PaliGemma, question: str, answer: str | None = None) -> dict:
    """The processor's own inputs, and the images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in CAMERAS]
    batch = dict(vlm.text.processor(images=[files], text=["<image>" * 6 + question], return_tensors="pt",
                                    suffix=[answer] if answer else None))
    pixels = np.stack([np.asarray(f) for f in files])
    batch["images"] = torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].float() / 255
    if answer is None:
        batch.pop("labels", None)
    return batch


def test_prompts_are_the_processors_own():
    """Our token ids, token kinds, pixels and loss are those of transformers' PaliGemma processor and
    model."""
    vlm = host("image+prompt")
    batch = processed(vlm, QUESTIONS[0], "yes")
    pack = vlm.pack([vlm.exchange(QUESTIONS[0], "yes")])[0]
    assert batch["input_ids"][0, vlm.tokens :].tolist() == pack[P.IDS].tolist()
    assert (batch["input_ids"][0, : vlm.tokens] == vlm.net.config.image_token_id).all()
    with pytest.raises(P.InputError, match="a question of 100000 letters"):  # its square of scores fits nowhere
        vlm.text.prompt("x" * 100_000)
    assert batch["token_type_ids"][0, vlm.tokens :].tolist() == (pack[P.KIND] > 0).long().tolist()
    assert torch.allclose((batch["images"][0] - vlm.pixel_mean) / vlm.pixel_std, batch["pixel_values"],
                          atol=1e-5)
    images = batch.pop("images")
    with torch.no_grad():
        theirs = vlm.net(**batch)
        last = vlm.run(vlm.encode(images), pack[None], ONE).last
        assert torch.allclose(vlm.logits(last), theirs.logits, atol=1e-5)
        assert loss(vlm, last, pack[None]) == pytest.approx(theirs.loss.item(), rel=1e-4)


def test_generate_is_transformers_greedy_search():
    vlm = host("image+prompt")
    batch = processed(vlm, QUESTIONS[1])
    images, length = batch.pop("images"), batch["token_type_ids"].shape[1]
    theirs = vlm.net.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=vlm.text.eos)
    with torch.no_grad():
        ours = vlm.generate(vlm.encode(images), [QUESTIONS[1]], ONE, 5)[0]
    assert ours == theirs[0, length:].tolist()[: len(ours)] and len(ours) >= 1


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_generation_behind_the_cache_equals_whole_passes(prefix):
    """Token by token behind a cache, several prompts at once = one prompt, one whole pass a token."""
    vlm, images = host(prefix), pictures()
    with torch.no_grad():
        seen = vlm.read_prefix(vlm.encode(images))
        together = vlm.generate(seen, QUESTIONS, torch.zeros(3, dtype=torch.int64), 4)
        for question, written in zip(QUESTIONS, together):
            for k, token in enumerate(written):
                pack = vlm.pack([P.Exchange(vlm.text.prompt(question), [*written[:k], 0])])[0]
                last = vlm.run(vlm.encode(images), pack[None], ONE).last
                assert vlm.logits(last[0, -2]).argmax().item() == token


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_own_pass_equals_the_plain_pass(prefix):
    """The next token's logits, and one more token behind the cache: transformers' own, under both
    prefixes."""
    vlm = host(prefix)
    with torch.no_grad():
        own, decode = vlm.own_pass(vlm.read_prefix(vlm.encode(pictures())), QUESTIONS[0])
        plain, decode_plain = vlm.plain_pass(pictures(), QUESTIONS[0])
        assert torch.allclose(own, plain, atol=1e-5)
        assert torch.allclose(decode()[0, -1], decode_plain().logits[0, -1], atol=1e-5)


def test_small_tokenizer_reads_any_text():
    vlm = host()
    for text in (*QUESTIONS, "Wo steht der Bus? äöü 漢字 #42"):
        assert vlm.text.decode(vlm.text.tokenizer.encode(text)) == text
    assert all(vlm.text.decode(vlm.text.answer(a)) == a for a in ANSWERS) and len(set(ANSWERS)) == 30


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_what_attends_to_what(prefix):
    """Images, <bos> (and the prompt) both ways; answers causal; exchanges and candidates never see each
    other."""
    n, asked = 3, [P.Exchange([50, 51], [60, 61]), P.Exchange([52], candidates=([70, 71], [72]))]
    packs = P.pack(asked, 2, n, prefix)
    seen = [P.attends(p[None], n)[0] for p in packs]
    names = [["i"] * n + [str(t) for t in p[P.IDS].tolist()] for p in packs]
    sees: dict[str, set] = {}
    for row, allowed in zip(names, seen):
        for i, a in enumerate(row):
            sees.setdefault(a, set()).update(b for j, b in enumerate(row) if allowed[i, j])
    first = {"i", "2"} if prefix == "image" else {"i", "2", "50", "51"}
    second = {"i", "2"} if prefix == "image" else {"i", "2", "52"}
    if prefix == "image":
        assert sees["i"] == sees["2"] == {"i", "2"} and sees["50"] == first | {"50"}
        assert sees["51"] == first | {"50", "51"} and sees["52"] == second | {"52"}
    else:
        assert sees["50"] == sees["51"] == first and sees["52"] == second and sees["i"] == first | second
    assert sees["60"] == first | {"50", "51", "60"} and sees["61"] == first | {"50", "51", "60", "61"}
    assert sees["70"] == second | {"52", "70"} and sees["71"] == second | {"52", "70", "71"}
    assert sees["72"] == second | {"52", "72"}
    padded = P.stack_packs([packs[0], packs[0][:, :2]], 0)
    allowed = P.attends(padded, n)
    assert not allowed[1, :, n + 2 :].any() and torch.equal(P.attends(padded, n, 2), allowed[:, 2:])


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_questions_in_one_pack_are_independent(prefix):
    """Several questions about one keyframe give the loss that each gives alone."""
    vlm = host(prefix)
    with torch.no_grad():
        seen = vlm.encode(pictures())
        stacked = P.stack_packs(vlm.pack(exchanges(vlm)), vlm.text.pad)
        rows = torch.zeros(len(stacked), dtype=torch.int64)
        together = loss(vlm, vlm.run(seen, stacked, rows).last, stacked)
        alone = []
        for exchange in exchanges(vlm):
            pack = vlm.pack([exchange])[0][None]
            alone.append(loss(vlm, vlm.run(seen, pack, ONE).last, pack))
    weights = [len(exchange.answer) for exchange in exchanges(vlm)]
    assert together == pytest.approx(float(np.average(alone, weights=weights)), rel=1e-4)


@pytest.mark.parametrize("prefix", ["image", "image+prompt"])
def test_every_candidate_is_scored_alone(prefix):
    """All thirty in one pass = the sum of log-probabilities of each, asked alone."""
    vlm = host(prefix)
    with torch.no_grad():
        seen = vlm.read_prefix(vlm.encode(pictures()))
        table = vlm.score(seen, [QUESTIONS[0], QUESTIONS[2]], torch.zeros(2, dtype=torch.int64), ANSWERS)
        assert table.shape == (2, 30)
        for k in (0, 12, 17, 29):
            exchange = vlm.exchange(QUESTIONS[2], ANSWERS[k])
            pack = vlm.pack([exchange])[0][None]
            alone = loss(vlm, vlm.run(vlm.encode(pictures()), pack, ONE).last, pack) * len(exchange.answer)
            assert table[1, k].item() == pytest.approx(-alone, rel=1e-3)


def test_image_tokens_see_the_text_only_under_paligemmas_own_prefix():
    for prefix in ("image", "image+prompt"):
        vlm = host(prefix)
        with torch.no_grad():
            a, b = (vlm.run(vlm.encode(pictures()), vlm.stack([e], "cpu"), ONE, hidden=True)
                    for e in exchanges(vlm)[:2])
        apart = max((x[:, : vlm.tokens] - y[:, : vlm.tokens]).abs().max().item() for x,
                    y in zip(a.hidden, b.hidden))
        assert (apart < 1e-6) == (prefix == "image")


def test_means_weigh_keyframes_alike():
    values, keyframe = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 2])
    assert P.mean_over_keyframes(values, keyframe, 3).item() == pytest.approx((1.5 + 0 + 3) / 3)


# --- folders ------------------------------------------------------------------------------------------------


def test_answers_are_right_only_if_all_their_tokens_are():
    """A network that writes <eos> and nothing else is right where nothing is asked for, and never half right."""
    vlm = P.PaliGemma(P.random_host(SIZES, sentences()), 1, "image")
    eos = F.one_hot(torch.tensor(vlm.text.eos), 900).float()
    vlm.logits = lambda hidden: eos.expand(*hidden.shape[:-1], 900) + 0 * hidden[..., :1]
    asked = [[("Are there any cars?", "yes"), ("How many cars are there?", "")],
             [("Is there a bus in view?", "traffic cone"), ("What is it?", "")]]
    loss_, right = P.answer_loss(vlm, torch.rand(2, 3, 32, 32), asked)
    assert loss_ > 0 and right == 0.5


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A PaliGemma 2 of the true architecture with tiny sizes, saved as Google's is."""
    torch.manual_seed(5)
    made, folder = P.random_host(SIZES, sentences()), tmp_path_factory.mktemp("vlm") / "paligemma2-toy"
    made.net.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder


def edited(saved: Path, out: Path, change) -> Path:
    shutil.copytree(saved, out)
    change(out)
    return out


def test_a_saved_folder_gives_the_same_weights(saved, tmp_path):
    torch.manual_seed(5)
    made, found = P.random_host(SIZES, sentences()), P.load_host(str(saved))
    weights = made.net.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.net.state_dict().items())
    P.check_host(found, "x", 32, 6)
    vlm = P.PaliGemma(found, 6, "image")
    vlm.save_host(tmp_path / "0_host")
    assert not list((tmp_path / "0_host").glob("*.safetensors"))  # the weights are the checkpoints'
    again = P.load_host("x", folder=tmp_path / "0_host")
    assert again.net.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("break_it, words", [
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 40), "model.safetensors"),
    (lambda f: (f / "config.json").write_text("{}"), "--vlm"),
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "--vlm"),
])
def test_a_broken_folder_is_one_line(break_it, words, saved, tmp_path):
    folder = edited(saved, tmp_path / "v", break_it)
    with pytest.raises(InputError) as error:
        P.load_host(str(folder))
    assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_host_that_does_not_fit_is_one_line(saved, tmp_path):
    with pytest.raises(InputError,
                       match="no such folder; give a folder saved by transformers, a hub id, or tiny"):
        P.load_host(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="--image-size 64: .* takes 32 px"):
        P.check_host(P.load_host(str(saved)), "x", 64, 6)
    path = edited(saved, tmp_path / "v", lambda f: None) / "tokenizer.json"
    assert "<image>" in path.read_text()
    path.write_text(path.read_text().replace("<image>", "<picture>"))
    with pytest.raises(InputError, match="image token"):
        P.check_host(P.load_host(str(path.parent)), "x", 32, 6)
