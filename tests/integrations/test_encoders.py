# SPDX-License-Identifier: Apache-2.0
"""Models of other classes than language models: which class, what is around a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modewright.errors import DataError
from modewright.integrations.architecture import auto_class
from modewright.integrations.transformers import (
    build_from_config,
    load_model,
    special_tokens_around,
)
from support.language_models import save_tiny_encoder, save_tiny_llama

hf = pytest.importorskip("transformers")
KINDS = [
    *("BertModel", "BertForMaskedLM", "BertForSequenceClassification"),
    *("BertForTokenClassification", "BertForQuestionAnswering"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_says_of_which_class_its_model_is(tmp_path: Path, kind: str) -> None:
    folder = save_tiny_encoder(tmp_path / "model", kind)
    loaded = load_model(folder)

    assert type(loaded.model).__name__ == kind
    assert type(build_from_config(folder)).__name__ == kind


def test_a_config_without_a_class_is_that_of_a_language_model() -> None:
    assert auto_class(hf.LlamaConfig()) is hf.AutoModelForCausalLM
    assert auto_class(hf.DistilBertConfig()) is hf.AutoModel  # there is none of its kind


def test_a_class_that_takes_more_than_tokens_is_refused() -> None:
    config = hf.T5Config(architectures=["T5ForConditionalGeneration"])
    with pytest.raises(DataError, match=r"'T5ForConditionalGeneration'.*pass it as a module"):
        auto_class(config)


def test_the_tokens_around_a_text_are_found(tmp_path: Path) -> None:
    encoder = load_model(save_tiny_encoder(tmp_path / "encoder"))
    llama = load_model(save_tiny_llama(tmp_path / "llama"))

    assert special_tokens_around(encoder.tokenizer) == ([1], [2])
    assert special_tokens_around(llama.tokenizer) == ([], [])
    assert torch.is_tensor(encoder.model(torch.tensor([[1, 5, 2]])).last_hidden_state)
