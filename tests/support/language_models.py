# SPDX-License-Identifier: Apache-2.0
"""A tiny language model and encoder, saved as transformers saves them, and text they can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]


def save_tiny_llama(
    folder: Path,
    *,
    tied: bool = True,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    shard_size: int | None = None,
) -> Path:
    """Write a small Llama with a word-level tokenizer; the same one at every call.

    Args:
        folder: Where.
        tied: Whether embedding and head share their weight.
        layers: The number of blocks.
        dtype: The dtype of the weights in the files.
        shard_size: Bytes of a safetensors file at most; one file if left out.
    """
    import tokenizers
    import transformers

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    sizes = {} if shard_size is None else {"max_shard_size": shard_size}
    model.to(dtype).save_pretrained(folder, **sizes)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path, kind: str = "BertModel") -> Path:
    """Write a small BERT, of one of its classes, whose tokenizer puts tokens around a text."""
    import tokenizers
    import transformers

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_text(path: Path) -> Path:
    """Write a text file of enough passages for both splits."""
    passages = []
    for number in range(60):
        words = [f"w{(number * 7 + i * i) % 61}" for i in range(700)]
        passages.append(" ".join(words))
    path.write_text("\n\n".join(passages))
    return path


def tiny_recipe(text: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe that is run in seconds on the tiny model."""
    data = {"source": str(text), "windows": 4, "length": 16}
    return {
        "name": "tiny",
        "steps": [
            {"mode": "quantize", "config": {"scheme": "w8a8_static", "ignore": ["lm_head"]}},
            {"mode": "max_calibrate"},
        ],
        "calibration": data,
        "evaluation": data,
        **changes,
    }
