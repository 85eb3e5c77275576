# SPDX-License-Identifier: Apache-2.0
"""More calibration windows from the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import modewright
from modewright.calibration.augmentation import more_windows, replace_tokens
from modewright.calibration.self_text import generate_windows, writes_text
from modewright.errors import ConfigError, DataError, ModewrightError
from modewright.recipes.loader import load_recipe
from modewright.recipes.schema import Recipe, RecipeStep, TextData
from modewright.run.data import load_data
from modewright.run.subject import open_subject
from support.language_models import save_tiny_llama, tiny_recipe, write_text

VOCABULARY = torch.arange(100, 200)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    count=st.integers(0, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_copies_hold_tokens_of_the_windows_and_of_the_vocabulary(
    lengths: list[int], count: int, share: float, seed: int
) -> None:
    windows = [torch.arange(n)[None] for n in lengths]
    before = [w.clone() for w in windows]

    made = replace_tokens(
        windows, count=count, vocabulary=VOCABULARY, special=[0, 150], share=share, seed=seed
    )

    assert len(made) == count
    for index, copy in enumerate(made):
        original = windows[index % len(windows)]
        replaced = copy != original
        assert copy.shape == original.shape
        assert copy.dtype == torch.int64
        assert copy[0, 0] == 0  # a special token stays
        assert torch.isin(copy[replaced], VOCABULARY).all()
        assert not (copy == 150).any()  # and is never put in
    assert all(map(torch.equal, windows, before))


def test_about_the_share_is_replaced_and_the_seed_decides_which() -> None:
    windows = [torch.zeros(1, 4000, dtype=torch.int64)]
    first, second = replace_tokens(windows, count=2, vocabulary=VOCABULARY, share=0.3)
    (again,) = replace_tokens(windows, count=1, vocabulary=VOCABULARY, share=0.3)
    (other,) = replace_tokens(windows, count=1, vocabulary=VOCABULARY, share=0.3, seed=1)

    assert (first != 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(first[first != 0].unique()) == len(VOCABULARY)


@pytest.mark.parametrize(
    ("wrong", "kind", "match"),
    [
        ({"count": -1}, ConfigError, "count: expected 0 or more, got -1"),
        ({"share": 1.5}, ConfigError, "share: expected a number from 0 to 1, got 1.5"),
        ({"special": range(100, 200)}, DataError, "no tokens"),
    ],
)
def test_wrong_arguments_are_refused(
    wrong: dict[str, Any], kind: type[ModewrightError], match: str
) -> None:
    arguments: dict[str, Any] = {"count": 1, "vocabulary": VOCABULARY, **wrong}
    with pytest.raises(kind, match=match):
        replace_tokens([torch.zeros(1, 3, dtype=torch.int64)], **arguments)


def test_a_recipe_adds_windows_for_calibration(tmp_path: Path) -> None:
    model, text = save_tiny_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    own = {"source": str(text), "windows": 3, "length": 16, "augmented": 4}
    recipe = load_recipe(tiny_recipe(text, calibration=own))
    subject = open_subject(model, registry=modewright.default_registry)

    data = load_data(recipe, subject, uses_calibration=True)

    assert data.calibration is not None
    batches = data.calibration.batches()
    assert len(batches) == 7
    written = generate_windows(subject.model, count=4, length=16, seed=0)
    assert torch.equal(torch.cat(list(batches[3:])), written)  # a language model writes them


def test_an_encoder_gets_windows_with_other_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=90, num_hidden_layers=1, pad_token_id=0, **sizes)
    model = transformers.BertModel(config)
    windows = [torch.arange(1, 41)[None]]

    (more,) = more_windows(model, windows, count=1, special=[1, 40])

    assert not writes_text(model, windows[0])
    assert more[0, [0, -1]].tolist() == [1, 40]
    assert 0.2 < (more != windows[0]).float().mean().item() < 0.8
    assert more_windows(model, windows, count=0) == []


def test_quality_is_not_measured_on_them() -> None:
    with pytest.raises(ValueError, match="augmented windows are for calibration"):
        Recipe(name="r", steps=(RecipeStep(mode="max"),), evaluation=TextData(augmented=1))
