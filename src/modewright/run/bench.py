# SPDX-License-Identifier: Apache-2.0
"""``bench``: how fast and how large a model is, beside the one that it was made from.

All models are loaded, then measured in turn, over and over: what slows the machine down meanwhile
slows all of them. A number is the median of its repetitions, with the fastest and slowest beside.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.builtin_modes import default_registry
from modewright.calibration.self_text import writes_text
from modewright.errors import ConfigError, DataError
from modewright.modes.checkpoint import restore
from modewright.modes.registry import ModeRegistry
from modewright.modes.storage import MANIFEST_NAME
from modewright.run.device import device_of, named_device
from modewright.run.optimize import RecipeLike, optimize

OnProgress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One kind of work, measured several times.

    Attributes:
        name: ``decode``, ``prefill`` or ``forward``.
        unit: What is counted: tokens or samples.
        seconds: Wall-clock seconds for one unit: the median.
        fastest: The shortest.
        slowest: The longest.
        cpu_seconds: Seconds of the processor for one unit, of all threads: the median.
        repeats: How often it was measured.
    """

    name: str
    unit: str
    seconds: float
    fastest: float
    slowest: float
    cpu_seconds: float
    repeats: int

    @property
    def per_second(self) -> float:
        """Units in a second."""
        return 1 / self.seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one model.

    Attributes:
        name: The model as it was named.
        timings: How fast it is.
        weight_bytes: Bytes of its parameters and buffers in memory; shared ones count once.
        disk_bytes: Size of the files with its weights; ``None`` for a model that was passed.
        load_seconds: Wall-clock seconds to load it; ``None`` for a model that was passed.
    """

    name: str
    timings: tuple[Timing, ...]
    weight_bytes: int
    disk_bytes: int | None = None
    load_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What :func:`bench` measured.

    Attributes:
        models: The model, and after it the one that it is compared with, if any.
        threads: Threads that torch used.
        prompt: Tokens before decoding began.
        length: Tokens of the prefill, and of the text that an encoder takes.
    """

    models: tuple[Measured, ...]
    threads: int
    prompt: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON data, with the ratios to the last model."""
        data = asdict(self)
        for model, row in zip(self.models, data["models"], strict=True):
            for timing, entry in zip(model.timings, row["timings"], strict=True):
                entry["per_second"] = timing.per_second
                entry["speedup"] = self.speedup(model, timing.name)
        return data

    def speedup(self, model: Measured, name: str) -> float:
        """Return how many times as fast a model does something as the last one."""
        own = next(t for t in model.timings if t.name == name)
        other = next(t for t in self.models[-1].timings if t.name == name)
        return other.seconds / own.seconds


@dataclass(frozen=True)
class _Work:
    """Something to measure.

    Attributes:
        run: Does it, and returns how many units it did.
        prepare: What comes before, every time, and is not measured.
    """

    run: Callable[[], int]
    prepare: Callable[[], None] = lambda: None


@dataclass
class _Subject:
    """A model to measure."""

    name: str
    model: nn.Module
    disk_bytes: int | None = None
    load_seconds: float | None = None
    works: dict[str, _Work] = field(default_factory=dict)


def bench(
    model: object,
    *,
    recipe: RecipeLike | None = None,
    against: object = None,
    inputs: Any = None,
    threads: int | None = None,
    prompt: int = 64,
    length: int = 512,
    tokens: int = 8,
    repeats: int = 5,
    device: str | None = None,
    registry: ModeRegistry | None = None,
    on_progress: OnProgress | None = None,
) -> BenchResult:
    """Measure a model and the one that it was made from.

    Args:
        model: A folder that a run wrote, any other model that :func:`modewright.optimize` takes, or
            a module.
        recipe: Optimize the model by it first; then it is compared with the model as it was.
        against: The model to compare with; a folder that a run wrote knows its original.
        inputs: For networks that take no tokens: a tensor whose first axis counts samples.
        threads: Threads for torch; as many as it uses now if left out.
        prompt: Tokens before decoding begins.
        length: Tokens of the prefill, and of the text that an encoder takes.
        tokens: Tokens that are decoded in one repetition.
        repeats: Repetitions.
        device: Where models that are loaded are measured; the CPU if left out.
        registry: Where modes are looked up; the default registry if left out.
        on_progress: Called with the name of a part, how much is done, and how much there is.

    Raises:
        ConfigError: A number is not positive, ``against`` goes with ``recipe``, or no such device.
        DataError: A model cannot be loaded, or the original is not known.
    """
    if min(prompt, length, tokens, repeats, 1 if threads is None else threads) < 1:
        raise ConfigError("threads, prompt, length, tokens and repeats must be 1 or more.")
    if recipe is not None and against is not None:
        raise ConfigError("with a recipe, the model is compared with itself: leave `against` out.")
    registry = default_registry if registry is None else registry
    place = named_device(device)
    say = on_progress or (lambda name, done, total: None)
    with _threads(threads) as used, tempfile.TemporaryDirectory() as made:
        if recipe is not None:
            if not isinstance(model, (str, Path)):
                raise ConfigError("a recipe needs the model as a path or name.")
            output = Path(made) / "optimized"
            more: Any = {"device": device, "registry": registry, "on_progress": on_progress}
            optimize(model, recipe, output=output, **more)
            model, against = output, model
        say("load", 0, None)
        subjects = [_opened(model, registry, place)]
        other = _original_of(model) if against is None else against
        if other is not None:
            subjects.append(_opened(other, registry, place))
        for subject in subjects:
            subject.works = _works(subject.model.eval(), inputs, prompt, length, tokens)
        measured = _measured(subjects, repeats, "tokens" if inputs is None else "samples", say)
    return BenchResult(models=measured, threads=used, prompt=prompt, length=length)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; what is shared counts once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _opened(source: object, registry: ModeRegistry, place: torch.device | None) -> _Subject:
    if isinstance(source, nn.Module):
        return _Subject(type(source).__name__, source)
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"expected a path, a name or a module; received {type(source).__name__}.")
    from modewright.integrations import transformers as hf

    folder = Path(source)
    hf.warm_up()  # importing transformers is not loading a model
    begin = time.perf_counter()
    if (folder / MANIFEST_NAME).is_file():
        model = restore(hf.build_from_config(folder), folder, registry=registry).to(place)
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    else:
        loaded = hf.load_model(source)
        model, size = loaded.model.to(place), loaded.bytes_on_disk
        seconds = time.perf_counter() - begin
    return _Subject(str(source), model, size, seconds)


def _original_of(model: object) -> str | None:
    """Return from what a run made the model that it wrote, ``None`` if it is no such folder."""
    folder = Path(model) if isinstance(model, (str, Path)) else None
    if folder is None or not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        source = found["source"]
        if isinstance(source, str):
            return source
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} does not say from which model it was made ({error}): pass that model with "
            "--against."
        ) from error
    raise DataError(f"{folder} names no model that it was made from: pass it with --against.")


def _works(
    model: nn.Module, inputs: Any, prompt: int, length: int, tokens: int
) -> dict[str, _Work]:
    """Return what is measured of a model, by name."""
    if inputs is not None:

        def forward() -> int:
            with torch.no_grad():
                model(inputs)
            return len(inputs)

        return {"forward": _Work(forward)}
    from modewright.integrations.generation import Decoding, prefill

    config = getattr(model, "config", None)
    vocabulary = int(getattr(config, "vocab_size", 0))
    if vocabulary < 1:
        raise ConfigError(
            f"{type(model).__name__} is no network of Transformers that takes tokens: pass "
            "`inputs`."
        )
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, vocabulary, (1, max(prompt, length)), generator=generator)
    text = text.to(device_of(model))
    if not writes_text(model, text):  # an encoder: it takes texts as a whole
        longest = int(getattr(config, "max_position_embeddings", length))
        return {"forward": _Work(lambda: _encoded(model, text[:, : min(length, longest)]))}
    started: list[Decoding] = []

    def decode() -> int:
        for _ in range(tokens):
            started[0].step()
        return tokens

    def before_decode() -> None:
        started[:] = [Decoding(model, text[:, :prompt])]

    def fill() -> int:
        prefill(model, text[:, :length])
        return length

    return {"decode": _Work(decode, before_decode), "prefill": _Work(fill)}


def _encoded(model: nn.Module, text: torch.Tensor) -> int:
    with torch.no_grad():
        model(text)
    return text.numel()


def _measured(
    subjects: list[_Subject], repeats: int, unit: str, say: OnProgress
) -> tuple[Measured, ...]:
    """Measure all models in turn, over and over."""
    names = list(subjects[0].works)
    seen: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for repeat in range(repeats + 1):  # the first one warms up and does not count
        say("measure", repeat, repeats + 1)
        for number, subject in enumerate(subjects):
            for name in names:
                sample = _timed(subject.works[name])
                if repeat:
                    seen.setdefault((number, name), []).append(sample)
    return tuple(
        Measured(
            name=subject.name,
            timings=tuple(_timing(name, unit, seen[number, name]) for name in names),
            weight_bytes=weight_bytes(subject.model),
            disk_bytes=subject.disk_bytes,
            load_seconds=subject.load_seconds,
        )
        for number, subject in enumerate(subjects)
    )


def _timed(work: _Work) -> tuple[float, float]:
    """Return wall-clock and processor seconds for one unit."""
    work.prepare()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    units = work.run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / units, (time.process_time() - cpu) / units


def _timing(name: str, unit: str, samples: list[tuple[float, float]]) -> Timing:
    wall = [sample[0] for sample in samples]
    return Timing(
        name=name,
        unit=unit,
        seconds=statistics.median(wall),
        fastest=min(wall),
        slowest=max(wall),
        cpu_seconds=statistics.median(sample[1] for sample in samples),
        repeats=len(samples),
    )


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Let torch use that many threads meanwhile."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
