# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that earlier versions wrote are restored for ever."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import modewright
from modewright.modes.manifest import MIGRATIONS
from modewright.modes.state import SCHEMA_VERSION

DATA = Path(__file__).parents[1] / "data"
VERSIONS = sorted(path.name for path in (DATA / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoints", DATA / "make_checkpoints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["quantized.safetensors", "quantized"], ids=["file", "folder"])
def test_checkpoint_of_an_earlier_version_gives_the_outputs_of_then(
    version: str, name: str, maker: ModuleType
) -> None:
    path = DATA / "checkpoints" / version / name
    assert modewright.verify(path).modes == ("quantize", "max_calibrate")
    model = modewright.restore(maker.SavedModel().eval(), path)
    with torch.no_grad():
        outputs = model(maker.INPUTS)
    expected = load_file(path.parent / "expected.safetensors")["outputs"]

    # The last bits may differ between the matrix kernels of two machines.
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    assert model.head.weight is model.embed.weight
    assert expected.std() > 0.01
    restored = model.state_dict()
    for name, tensor in maker.make_trained().state_dict().items():
        torch.testing.assert_close(restored[name], tensor, rtol=1e-6, atol=1e-7)


def test_every_schema_version_has_its_checkpoints_and_its_migration() -> None:
    versions = [f"v{number}" for number in range(1, SCHEMA_VERSION + 1)]

    assert versions == VERSIONS
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION))


def test_stored_checkpoints_are_small() -> None:
    files = [f for f in (DATA / "checkpoints").rglob("*") if f.is_file()]

    assert sum(f.stat().st_size for f in files) < 20_000 * len(VERSIONS)


def test_checkpoints_can_be_made_again(tmp_path: Path, maker: ModuleType) -> None:
    maker.main(tmp_path / "new")

    assert modewright.verify(tmp_path / "new" / "quantized").tensors > 8
