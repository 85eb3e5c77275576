# SPDX-License-Identifier: Apache-2.0
"""What ``import modewright`` offers, and what it costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import modewright

# What `import modewright` may load besides the interpreter's own start.
MODULE_BUDGET = 20
HEAVY = {"torch", "numpy", "transformers", "pydantic", "safetensors", "yaml", "rich", "click"}


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that a statement loads in a fresh interpreter."""
    code = (
        "import json, sys; before = set(sys.modules); "
        f"{statement}; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout))


@pytest.mark.parametrize("name", modewright.__all__)
def test_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(modewright, name)

    if name == "default_registry":
        assert "quantize" in value
    elif name != "__version__":
        assert len((inspect.getdoc(value) or "").split("\n")[0]) > 15


def test_dir_lists_exactly_the_public_names() -> None:
    assert dir(modewright) == sorted(modewright.__all__)
    assert len(set(modewright.__all__)) == len(modewright.__all__)


def test_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = modewright.quantise


def test_name_is_looked_up_once() -> None:
    assert modewright.apply_mode is modewright.apply_mode
    assert "apply_mode" in vars(modewright)


def test_import_loads_nothing_heavy_and_few_modules() -> None:
    loaded = loaded_by("import modewright")

    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()
    assert len(loaded) <= MODULE_BUDGET, sorted(loaded)


def test_engine_does_not_load_optional_packages() -> None:
    roots = {name.partition(".")[0] for name in loaded_by("import modewright.api")}

    assert "torch" in roots
    assert roots & {"transformers", "gguf", "accelerate", "datasets", "ray", "click", "rich"} == (
        set()
    )


def test_modes_can_be_listed_without_loading_torch() -> None:
    loaded = loaded_by(
        "from modewright.builtin_modes import default_registry; "
        "[default_registry.listed_summary(name) for name in default_registry]"
    )

    assert "torch" not in loaded
