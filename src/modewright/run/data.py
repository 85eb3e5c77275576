# SPDX-License-Identifier: Apache-2.0
"""The data of a run: what modes may look at, and what quality is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from modewright.calibration.augmentation import more_windows
from modewright.calibration.forward import OnBatch
from modewright.calibration.self_text import generate_windows
from modewright.calibration.text import Split, fingerprint, load_documents, make_windows
from modewright.errors import DataError
from modewright.recipes.schema import SELF, Recipe, TextData
from modewright.run.kept_text import KeptText, is_written
from modewright.run.subject import Subject


class _Size(TypedDict):
    count: int
    length: int
    seed: int


@dataclass(frozen=True)
class RunData:
    """Calibration and evaluation data.

    Attributes:
        calibration: Batches, or a function that runs the model; ``None`` if there is none.
        evaluation: Token windows int64 ``[windows, length]``; ``None`` if there are none.
    """

    calibration: CalibrationData | None = None
    evaluation: torch.Tensor | None = None

    @property
    def probe(self) -> torch.Tensor | None:
        """One window, to compare outputs on."""
        return None if self.evaluation is None else self.evaluation[:1]


class CalibrationData:
    """Batches or a function, with a fingerprint, that remembers whether any mode looked at it.

    Args:
        source: Batches, or a function that runs the model.
        mark: The fingerprint, if it is known.
    """

    def __init__(self, source: object, mark: str | None = None) -> None:
        if isinstance(source, Iterable) and not isinstance(source, Sequence):
            source = list(source)
        if mark is None and isinstance(source, Sequence):
            mark = fingerprint(source)
        self._source = source
        self.fingerprint = mark
        self.was_used = False

    def for_mode(self) -> object:
        """Return what a mode gets: something that can be iterated, or called, as the source can."""
        if isinstance(self._source, Sequence):
            return _Watched(self._source, self._note_use)
        if callable(self._source):
            function = self._source

            def run(model: Any) -> Any:
                self._note_use()
                return function(model)

            return run
        return self._source

    def batches(self) -> Sequence[Any]:
        """Return the batches.

        Raises:
            DataError: There are none: the source is a function that runs the model.
        """
        if not isinstance(self._source, Sequence):
            raise DataError(
                "calibration: a function runs the whole model, which streaming never holds. Pass "
                "batches."
            )
        return self._source

    def _note_use(self) -> None:
        self.was_used = True


class _Watched(Sequence[Any]):
    """A sequence that tells when it is read."""

    def __init__(self, items: Sequence[Any], on_use: Callable[[], None]) -> None:
        self._items, self._on_use = items, on_use

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        self._on_use()
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        self._on_use()
        return iter(self._items)


def load_data(
    recipe: Recipe,
    subject: Subject,
    *,
    uses_calibration: bool,
    calibration: object = None,
    evaluation: torch.Tensor | None = None,
    output: Path | None = None,
    on_batch: OnBatch | None = None,
) -> RunData:
    """Cut calibration and evaluation windows from text, or take what the caller brings.

    Text that the model writes is written here, before any mode changes it.

    Raises:
        DataError: The text cannot be read, or there is too little of it.
    """
    has_tokenizer = subject.tokenizer is not None
    if evaluation is None and has_tokenizer:
        found = _windows_of_text(subject, recipe.evaluation, "evaluation")
        evaluation = torch.cat(list(found.values()))
    data = None
    if uses_calibration:
        data = load_calibration(recipe, subject, calibration, output, on_batch)
    return RunData(data, evaluation)


def load_calibration(
    recipe: Recipe,
    subject: Subject,
    calibration: object = None,
    output: Path | None = None,
    on_batch: OnBatch | None = None,
) -> CalibrationData | None:
    """Cut calibration windows from text, or take what the caller brings.

    What the model writes is kept beside the ``output`` until that is made.

    Returns:
        The data; ``None`` if there is neither.

    Raises:
        DataError: The text cannot be read, or there is too little of it.
    """
    if calibration is not None:
        return CalibrationData(calibration)
    if subject.tokenizer is None and set(recipe.calibration.windows_of) != {SELF}:
        return None
    tokens = _calibration_windows(subject, recipe.calibration, output, on_batch)
    return CalibrationData([tokens[i : i + 1] for i in range(len(tokens))], fingerprint(tokens))


def _calibration_windows(
    subject: Subject, text: TextData, output: Path | None, on_batch: OnBatch | None
) -> torch.Tensor:
    """Return calibration windows; those that a model wrote are kept beside the output."""
    found = _windows_of_text(subject, text, "calibration")
    if output is None or not is_written(text):
        return _complete(subject, text, found, on_batch)
    marks = [subject.revision(), *(fingerprint(windows) for windows in found.values())]
    kept = KeptText(output, text, marks)
    tokens = kept.read()
    if tokens is None:
        tokens = _complete(subject, text, found, on_batch)
        kept.keep(tokens)
    return tokens


def _text_windows(subject: Subject, documents: list[str], size: _Size) -> torch.Tensor:
    """Cut windows; what is no language model gets each as a text, with the tokens around it."""
    encode = subject.encode()
    if subject.predicts_next_token:
        return make_windows(documents, encode, **size)
    from modewright.integrations.transformers import special_tokens_around

    before, after = map(torch.tensor, special_tokens_around(subject.tokenizer))
    length = size["length"] - len(before) - len(after)
    longest = getattr(getattr(subject.model, "config", None), "max_position_embeddings", None)
    if length < 1 or (longest is not None and size["length"] > longest):
        raise DataError(
            f"Windows of {size['length']} tokens were asked for; this model takes from "
            f"{len(before) + len(after) + 1} to {longest} tokens. Set `length` in the recipe."
        )
    rows = make_windows(documents, encode, count=size["count"], length=length, seed=size["seed"])
    around = [part.long().expand(len(rows), -1) for part in (before, after)]
    return torch.cat([around[0], rows, around[1]], 1)


def _windows_of_text(subject: Subject, text: TextData, split: Split) -> dict[str, torch.Tensor]:
    """Return windows ``[n, length]`` of every source but what the model writes."""
    return {
        source: _text_windows(
            subject,
            load_documents(source, split),
            {"count": count, "length": text.length, "seed": text.seed},
        )
        for source, count in text.windows_of.items()
        if count and source != SELF
    }


def _complete(
    subject: Subject, text: TextData, found: dict[str, torch.Tensor], on_batch: OnBatch | None
) -> torch.Tensor:
    """Return windows of all sources, one after another, and those that the recipe wants besides."""
    parts = []
    for source, count in text.windows_of.items():
        if source in found:
            parts.append(found[source])
        elif count:
            size: _Size = {"count": count, "length": text.length, "seed": text.seed}
            parts.append(generate_windows(subject.model, **size, on_batch=on_batch))
    parts += more_windows(
        subject.model,
        torch.split(torch.cat(parts), 1),
        count=text.augmented,
        special=getattr(subject.tokenizer, "all_special_ids", ()),
        seed=text.seed,
        write=not any(p.is_meta for p in subject.model.parameters()),
        on_batch=on_batch,
    )
    return torch.cat(parts)
