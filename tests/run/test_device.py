# SPDX-License-Identifier: Apache-2.0
"""Where a run's model is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from modewright.errors import ConfigError
from modewright.run.bench import bench
from modewright.run.device import device_of, named_device, require_cpu
from modewright.run.optimize import optimize
from support.language_models import save_tiny_llama, tiny_recipe


def test_a_device_has_a_name() -> None:
    assert named_device(None) is None
    assert named_device("cpu") == torch.device("cpu")
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.ReLU()) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        named_device(name)


def test_a_run_checks_the_device_before_it_loads_anything(tmp_path: Path) -> None:
    for work in (optimize, bench):
        with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used"):
            work(tmp_path / "missing", recipe="w8a16", device="cuda:99")


def test_going_block_by_block_is_for_the_cpu() -> None:
    require_cpu(None)
    require_cpu(torch.device("cpu"))
    with pytest.raises(ConfigError, match="--no-stream"):
        require_cpu(torch.device("cuda"))


def test_a_module_is_optimized_where_it_is() -> None:
    with pytest.raises(ConfigError, match="move it there first"):
        optimize(nn.Linear(4, 4), "w8a16", device="cpu")


def test_a_model_from_files_is_optimized_on_the_device(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = save_tiny_llama(tmp_path / "llama")

    result = optimize(folder, tiny_recipe(text), output=tmp_path / "output", device="cpu")

    assert result.restored_in == "a fresh process"
    assert device_of(result.model) == torch.device("cpu")
