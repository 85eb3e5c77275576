# SPDX-License-Identifier: Apache-2.0
"""Text that a language model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.calibration.self_text import generate_windows, writes_text
from modewright.errors import ConfigError, DataError
from modewright.recipes.loader import load_recipe
from modewright.recipes.schema import TextData
from modewright.run.data import load_data
from modewright.run.subject import open_subject
from support.language_models import save_tiny_llama, tiny_recipe, write_text


class Chain(nn.Module):
    """A language model that knows which token follows which."""

    def __init__(self, size: int = 12, sharpness: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(size, size)
        with torch.no_grad():
            table = torch.randn(size, size, generator=generator) * sharpness
            self.embedding.weight.copy_(table)
        self.lengths: list[int] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.lengths.append(ids.shape[1])
        result: torch.Tensor = self.embedding(ids)
        return result


def llama(**config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    values = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **config}))
        for parameter in model.parameters():
            parameter.data.mul_(8)
    made: nn.Module = model
    return made


def test_windows_have_the_shape_that_was_asked_for() -> None:
    windows = generate_windows(Chain(), count=70, length=9, seed=0)
    assert windows.shape == (70, 9)
    assert windows.dtype == torch.int64
    assert windows.min() >= 0
    assert windows.max() < 12
    assert generate_windows(Chain(), count=1, length=1, seed=0).shape == (1, 1)


def test_the_seed_alone_decides() -> None:
    model = Chain()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate_windows(model, count=5, length=30, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(generate_windows(Chain(), count=5, length=30, seed=3), first)
    assert not torch.equal(generate_windows(Chain(), count=5, length=30, seed=4), first)


def test_the_tokens_after_the_first_are_the_most_probable() -> None:
    model = Chain()
    windows = generate_windows(model, count=20, length=40, seed=0, greedy=6)
    best = model.embedding.weight.argmax(-1)
    assert torch.equal(windows[:, 1:7], best[windows[:, :6]])
    assert not torch.equal(windows[:, 7:], best[windows[:, 6:-1]])


def test_later_tokens_are_drawn_as_probable_as_they_are() -> None:
    model = Chain(size=3, sharpness=1.0)
    windows = generate_windows(model, count=64, length=200, seed=0, greedy=0, temperature=2.0)
    expected = (model.embedding.weight / 2).softmax(-1)
    pairs = windows[:, :-1].reshape(-1) * 3 + windows[:, 1:].reshape(-1)
    counts = torch.bincount(pairs, minlength=9).reshape(3, 3).float()
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), expected, atol=0.03, rtol=0)


def test_a_temperature_near_zero_takes_the_most_probable() -> None:
    cold = generate_windows(Chain(), count=5, length=30, seed=0, temperature=1e-6)
    assert torch.equal(cold, generate_windows(Chain(), count=5, length=30, seed=0, greedy=30))


def test_windows_begin_with_any_but_special_tokens() -> None:
    model = llama(bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0)
    begun = generate_windows(model, count=600, length=1, seed=0)
    assert set(begun[:, 0].tolist()) == set(range(40)) - {0, 1, 2, 5}


def test_first_tokens_can_be_named() -> None:
    begun = generate_windows(Chain(), count=50, length=2, seed=0, first_tokens=[3, 7])
    assert set(begun[:, 0].tolist()) == {3, 7}


def test_a_cache_changes_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.train()
    cached = generate_windows(model, count=3, length=12, seed=0)
    assert model.training

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lengths = model, []

        def forward(self, ids: torch.Tensor) -> Any:
            self.lengths.append(ids.shape[1])
            return self.inner(ids, use_cache=False)

    plain = Plain()
    again = generate_windows(plain, count=3, length=12, seed=0, first_tokens=_ids(model))
    assert torch.equal(cached, again)
    assert plain.lengths == list(range(1, 12))

    fed: list[int] = []
    model.model.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda m, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate_windows(model, count=3, length=12, seed=0)
    assert fed == [1] * 11


def _ids(model: nn.Module) -> list[int]:
    return [i for i in range(40) if i not in (model.config.bos_token_id, model.config.eos_token_id)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"length": 0}, {"greedy": -1}, {"temperature": 0.0}]
)
def test_numbers_out_of_range_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate_windows(Chain(), **{"count": 1, "length": 2, "seed": 0, **wrong})


def test_windows_longer_than_the_model_takes_are_an_error() -> None:
    with pytest.raises(DataError, match="8 tokens at most"):
        generate_windows(llama(max_position_embeddings=8), count=1, length=9, seed=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "vocabulary of Linear is unknown"),
        (nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), "cannot write text"),
        (Chain(sharpness=float("inf")), "not finite"),
    ],
)
def test_a_model_that_cannot_write_is_an_error(model: nn.Module, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate_windows(model, count=1, length=3, seed=0)


def test_nothing_to_begin_with_is_an_error() -> None:
    with pytest.raises(DataError, match="first_tokens is empty"):
        generate_windows(Chain(), count=1, length=3, seed=0, first_tokens=[])


# In a recipe.


def batches(model: object, source: Any, windows: int, text: Path, **more: Any) -> list[Any]:
    data = {"source": source, "windows": windows, "length": 16, **more}
    recipe = load_recipe(tiny_recipe(text, calibration=data))
    subject = open_subject(model, registry=modewright.default_registry)
    loaded = load_data(recipe, subject, uses_calibration=True).calibration
    assert loaded is not None
    found: Any = loaded.for_mode()
    return list(found)


def test_a_recipe_may_take_text_from_several_sources(tmp_path: Path) -> None:
    model, text = save_tiny_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    own = batches(model, "self", 3, text)
    mixed = batches(model, [str(text), "self"], 7, text)
    read = batches(model, str(text), 4, text)

    assert [tuple(batch.shape) for batch in mixed] == [(1, 16)] * 7
    assert all(map(torch.equal, mixed, read + own))
    assert not all(map(torch.equal, own, batches(model, "self", 3, text, seed=1)))


def test_a_model_without_a_tokenizer_can_write(tmp_path: Path) -> None:
    assert len(batches(llama(), "self", 2, tmp_path)) == 2
    recipe = load_recipe(tiny_recipe(tmp_path))
    subject = open_subject(llama(), registry=modewright.default_registry)
    assert load_data(recipe, subject, uses_calibration=True).calibration is None


def test_windows_are_split_evenly() -> None:
    assert TextData(windows=8, source=("a", "b", "c")).windows_of == {"a": 3, "b": 3, "c": 2}
    assert TextData(windows=1, source=("a", "b")).windows_of == {"a": 1, "b": 0}
    assert TextData(windows=5, source="a").windows_of == {"a": 5}


@pytest.mark.parametrize(
    ("field", "source", "message"),
    [
        ("evaluation", "self", "evaluation: .*cannot be measured on text that it wrote"),
        ("evaluation", ["builtin", "self"], "evaluation: .*'self' is for calibration"),
        ("calibration", [], "calibration.source: .*expected a source"),
        ("calibration", ["self", "self"], "calibration.source: .*list of different ones"),
    ],
)
def test_sources_that_make_no_sense_are_errors(
    tmp_path: Path, field: str, source: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(tiny_recipe(tmp_path, **{field: {"source": source}}))


def test_writing_says_how_far_it_is() -> None:
    seen: list[tuple[int, int]] = []
    generate_windows(Chain(), count=3, length=5, seed=0, on_batch=lambda *now: seen.append(now))

    assert seen == [(done, 15) for done in (3, 6, 9, 12, 15)]


def test_a_network_that_fills_gaps_writes_no_text() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=90, num_hidden_layers=1, **sizes)
    window = torch.arange(1, 9)[None]

    assert not writes_text(transformers.BertForMaskedLM(config), window)
    config.is_decoder = True
    assert writes_text(transformers.BertLMHeadModel(config), window)
