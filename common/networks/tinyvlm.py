"""A PaliGemma 2 (Steiner et al., 2024) of the true architecture with tiny sizes, for a CPU and without a
download.

    processor = tiny_processor(sentences, SIZES)     # its tokenizer learns from these sentences
    vlm = tiny_vlm(processor, SIZES)                 # random weights; data/tinyvlm.py teaches it to see
"""

from typing import Any, NamedTuple

from torch import nn


class Sizes(NamedTuple):
    """tiny: CPU, all of them."""

    image: int = 128  # [px]
    patch: int = 16  # [px]
    width: int = 128  # of the vision tower and of the language model
    vision_layers: int = 3
    layers: int = 3  # of the language model
    vocabulary: int = 900  # tokens


SIZES = Sizes()


def tiny_processor(sentences: list[str], sizes: Sizes = SIZES) -> Any:
    """Builds PaliGemma's processor around a byte-level BPE that is learned from `sentences`.

    Frequent words become one token. Anything else falls to bytes, so every text can be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=sizes.vocabulary, special_tokens=[*names.values(), "<image>"],
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    image_token = {"image_token": "<image>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=image_token, **names)
    images = SiglipImageProcessorPil(size={"height": sizes.image, "width": sizes.image})
    images.image_seq_length = (sizes.image // sizes.patch) ** 2
    return PaliGemmaProcessor(images, fast)


def tiny_vlm(processor: Any, sizes: Sizes = SIZES) -> nn.Module:
    """Builds a PaliGemmaForConditionalGeneration of these sizes with random weights."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text, w = processor.tokenizer, sizes.width
    # Gemma 2 normalises what each layer adds: from the usual 0.02 a narrow model's image tokens would drown
    shared = {"hidden_size": w, "initializer_range": w**-0.5}
    ids = {name: getattr(text, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vision = {"model_type": "siglip_vision_model", "hidden_size": w, "intermediate_size": 3 * w,
              "num_hidden_layers": sizes.vision_layers, "num_attention_heads": 4, "patch_size": sizes.patch,
              "image_size": sizes.image, "vision_use_head": False}
    language = {"model_type": "gemma2", "intermediate_size": 3 * w, "num_hidden_layers": sizes.layers,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": w // 4,
                "query_pre_attn_scalar": w // 4, "vocab_size": len(text)}
    config = PaliGemmaConfig(vision_config=vision, text_config=language | shared | ids, projection_dim=w,
                             vocab_size=len(text), image_token_index=text.image_token_id, **shared, **ids)
    return PaliGemmaForConditionalGeneration(config)
