# SPDX-License-Identifier: Apache-2.0
"""A real language model, packed: small, restored without the original, and it still writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modewright
from modewright.integrations import transformers as hf
from modewright.integrations.generation import Decoding
from modewright.run.bench import weight_bytes

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe makes of the demo model."""
    output = tmp_path_factory.mktemp("packed") / "out"
    result = modewright.optimize("demo:smollm2", "int4-packed", output=output)

    assert result.restored_in == "a fresh process"
    assert result.loss_increase is not None
    assert result.loss_increase < 0.2
    assert result.size_after == result.packed_size
    assert result.size_after <= 90e6
    assert not result.skipped
    return output


def restored(folder: Path) -> Any:
    return modewright.restore(hf.build_from_config(folder), folder).eval()


def test_it_takes_the_memory_that_its_bits_say(folder: Path) -> None:
    model = restored(folder)

    assert weight_bytes(model) <= 90e6
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 91e6
    assert modewright.verify(folder).modes == ("quantize", "mse", "compress")


def test_it_writes_what_the_model_before_saving_writes(folder: Path) -> None:
    tokenizer = hf.load_tokenizer(folder)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = torch.tensor([hf.encode(tokenizer)(text)])
    run = Decoding(restored(folder), prompt)
    tokens = [run.tokens, *(run.step() for _ in range(11))]
    said = tokenizer.decode(torch.cat(tokens, dim=1)[0])

    assert "Paris" in said


def test_decompressed_it_is_a_plain_model_that_predicts_the_same(folder: Path) -> None:
    model = restored(folder)
    tokens = torch.arange(100, 132).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        plain = modewright.apply_mode(model, "decompress")
        found = plain(tokens).logits

    assert type(plain.get_submodule("lm_head")) is torch.nn.Linear
    assert float((found - expected).norm() / expected.norm()) < 0.05
