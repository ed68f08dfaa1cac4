"""A small untrained CLIPModel with a word-level tokenizer, saved as transformers saves them."""

from pathlib import Path


def make_tokenizer(words: set[str]):
    """A word-level tokenizer: lower case, punctuation apart, <unk> for all other words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<unk>", "<end>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 1), ("<end>", 3)])
    names = {"pad_token": "<pad>", "bos_token": "<start>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_small_clip(folder: Path, words: set[str], dim: int = 64, seed: int = 0) -> None:
    """Write a random CLIPModel of about half a million parameters, and its tokenizer, into `folder`."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    tokenizer, special = make_tokenizer(words), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    part = {"num_attention_heads": 4, "projection_dim": dim}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
    text |= {"max_position_embeddings": 32} | special | part
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision | part, projection_dim=dim)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
