# SPDX-License-Identifier: Apache-2.0
"""A save that is killed, or whose disk is full, leaves the old checkpoint whole.

Children are forked, not started: nothing is imported again, so dozens of kills take a second.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modewright.errors import CheckpointError
from modewright.modes import storage
from modewright.modes.apply import apply_mode
from modewright.modes.checkpoint import restore, save, verify
from support.example_modes import example_registry
from support.models import LM
from support.photograph import contents

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

REGISTRY = example_registry()
KILLED, DONE, REFUSED = 77, 0, 78


def make_old() -> Any:
    torch.manual_seed(8)
    return apply_mode(LM.make(), "random_mask", registry=REGISTRY)


def make_new() -> Any:
    torch.manual_seed(9)
    model = apply_mode(LM.make(), ["gain", "random_mask"], registry=REGISTRY)
    with torch.no_grad():
        model.embed.weight.add_(1)
    return model


@pytest.fixture(params=["model.safetensors", "folder"], ids=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "MAX_SHARD_BYTES", 700)  # several shards
    return tmp_path / request.param


@pytest.fixture
def outcomes(path: Path) -> Callable[[], str]:
    """Tell which of the two checkpoints lies at ``path``, whole and restorable."""
    old, new = contents(make_old()), contents(make_new())

    def look() -> str:
        verify(path, registry=REGISTRY)
        found = contents(restore(LM.make(), path, registry=REGISTRY))
        assert found in (old, new)
        return "old" if found == old else "new"

    return look


def fresh_old(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path.parent)
        path.parent.mkdir()
    save(make_old(), path)


def in_child(body: Callable[[], object]) -> int:
    """Run ``body`` in a forked child; return its exit code, or minus the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads, Python 3.12
        child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            body()
            code = DONE
        except CheckpointError:
            code = REFUSED
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


# --- killed at a certain call --------------------------------------------------------------------


@contextlib.contextmanager
def dying_at(call: int, *, after: bool) -> Iterator[list[str]]:
    """Leave the process at the n-th call of anything that touches the disk."""
    calls: list[str] = []

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == call and not after:
                os._exit(KILLED)
            result = function(*args, **kwargs)
            if len(calls) - 1 == call and after:
                os._exit(KILLED)
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "save_file", wrapped("save_file", storage.save_file))
        patch.setattr(storage.os, "fsync", wrapped("fsync", os.fsync))
        for name in ("replace", "unlink", "write_text"):
            patch.setattr(Path, name, wrapped(name, getattr(Path, name)))
        yield calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_save_that_is_killed_at_any_call_leaves_a_whole_checkpoint(
    path: Path, outcomes: Callable[[], str], after: bool
) -> None:
    new = make_new()
    fresh_old(path)
    with dying_at(-1, after=after) as calls:
        save(new, path)
    assert outcomes() == "new"
    assert {"save_file", "fsync", "replace"} <= set(calls)
    seen = []
    for call in range(len(calls)):
        fresh_old(path)

        def die(call: int = call) -> None:
            with dying_at(call, after=after):
                save(new, path)

        assert in_child(die) == KILLED
        seen.append(outcomes())
        save(new, path)
        assert outcomes() == "new"
    switch = seen.index("new")
    assert seen == ["old"] * switch + ["new"] * (len(seen) - switch)
    assert switch > 0


# --- killed, or refused, at a certain byte -------------------------------------------------------


def limited(model: Any, path: Path, size: int, action: Any) -> Callable[[], None]:
    def body() -> None:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(model, path)

    return body


def sizes(path: Path) -> list[int]:
    files = path.iterdir() if path.is_dir() else [path]
    largest = max(file.stat().st_size for file in files)
    return sorted({0, 1, 7, 8, 9, *range(16, largest, max(largest // 20, 1)), largest - 1})


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        pytest.param(signal.SIG_DFL, {-signal.SIGXFSZ}, id="killed"),
        pytest.param(signal.SIG_IGN, {REFUSED}, id="disk full"),
    ],
)
def test_save_that_ends_at_any_byte_leaves_the_old_checkpoint(
    path: Path, outcomes: Callable[[], str], action: Any, codes: set[int]
) -> None:
    new = make_new()
    save(new, path)
    limits = sizes(path)
    fresh_old(path)
    for size in limits:
        assert in_child(limited(new, path, size, action)) in codes, size
        assert outcomes() == "old", size
        if REFUSED in codes:
            left = [f.name for f in path.parent.rglob("*.tmp")]
            assert left == []
    save(new, path)
    assert outcomes() == "new"


def test_search_checkpoint_survives_a_kill(tmp_path: Path) -> None:
    from support.example_modes import WidthSearcher

    def search(**config: Any) -> Any:
        model = apply_mode(LM.make(), "widths", registry=REGISTRY)
        return WidthSearcher().search(model, {"width": 8}, LM.inputs, config)

    expected = search()
    path = tmp_path / "search"
    for call in range(0, 12, 2):
        path.unlink(missing_ok=True)

        def die(call: int = call) -> None:
            with dying_at(call, after=False):
                search(checkpoint=path)

        assert in_child(die) == KILLED
        assert search(checkpoint=path) == expected
