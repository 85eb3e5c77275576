# SPDX-License-Identifier: Apache-2.0
"""Building and loading the kernel library, and what happens where that is not possible."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from modewright.errors import KernelError
from modewright.runtime.backends import Case, choose
from modewright.runtime.native import build
from modewright.runtime.native import library as native
from modewright.runtime.native.build import library_path
from modewright.runtime.packed_weight import PackedSpec

INT4 = Case(PackedSpec("int4", (64, 128), "group", 64), "cpu", torch.float32, None, 1)
posix = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes are those of POSIX")


def compiler(folder: Path, script: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def private(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


def test_without_a_compiler_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(KernelError, match=r"no C\+\+ compiler: neither \$CXX nor any of c\+\+"):
        library_path(private(tmp_path / "made"))


def test_where_there_is_a_compiler_there_is_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.SWITCH, raising=False)
    try:
        build.find_compiler()
    except KernelError as error:
        pytest.skip(str(error))

    assert isinstance(native.library(), native.Library)


def test_where_nothing_can_be_built_torch_serves_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Path:
        raise KernelError("no C++ compiler")

    native._loaded.cache_clear()
    monkeypatch.setattr(native, "library_path", fail)
    try:
        assert native.library() == "no C++ compiler"
        assert choose(INT4).name == "int4pack"
    finally:
        native._loaded.cache_clear()


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEWRIGHT_NATIVE", "0")

    assert native.library() == "switched off by MODEWRIGHT_NATIVE=0"
    assert choose(INT4).name == "int4pack"


@posix
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "echo 'no space left' >&2; exit 1")))

    with pytest.raises(KernelError, match="failed: no space left"):
        library_path(private(tmp_path / "made"))
    assert list((tmp_path / "made").iterdir()) == []


@posix
def test_it_is_built_once_and_renamed_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    script = f'echo x >> {log}\nfor last; do :; done; echo made > "$last"'
    monkeypatch.setenv("CXX", str(compiler(tmp_path, script)))
    monkeypatch.setattr(build, "BUNDLED", tmp_path / "none")
    folder = private(tmp_path / "made")

    first = library_path(folder)
    calls = len(log.read_text().split())

    assert library_path(folder) == first
    assert len(log.read_text().split()) == calls > 1
    assert list(folder.iterdir()) == [first]


@posix
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = private(tmp_path / "made")
    folder.chmod(mode)

    with pytest.raises(KernelError, match="not this user's alone"):
        library_path(folder)


@posix
def test_a_library_that_others_can_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'for last; do :; done; echo made > "$last"'
    monkeypatch.setenv("CXX", str(compiler(tmp_path, script)))
    monkeypatch.setattr(build, "BUNDLED", tmp_path / "none")
    folder = private(tmp_path / "made")
    library_path(folder).chmod(0o666)

    with pytest.raises(KernelError, match="not this user's alone"):
        library_path(folder)


def test_the_name_follows_from_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = private(tmp_path / "source")
    for source in build.SOURCE.iterdir():
        (changed / source.name).write_bytes(source.read_bytes())
    before = build.library_name()
    monkeypatch.setattr(build, "SOURCE", changed)

    assert build.library_name() == before
    (changed / "scalar.cpp").write_text("// changed")
    assert build.library_name() != before


def test_the_source_comes_with_the_package() -> None:
    assert {f.name for f in build.SOURCE.glob("*.cpp")} >= {"linear.cpp", "scalar.cpp"}
    assert os.access(build.SOURCE, os.R_OK)
