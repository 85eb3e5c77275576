# SPDX-License-Identifier: Apache-2.0
"""The public verbs, with the default registry and with one of the caller's own."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch

import modewright
from modewright import api
from modewright.errors import ApplyModeError, CheckpointError, ConfigError, UnknownModeError
from support.example_modes import example_registry
from support.models import CNN, FAMILIES, LM, MLP, Family
from support.photograph import content, contents

MODES = [("quantize", {"scheme": "w8a16"}), "max_calibrate"]


def test_examples_in_docstrings_are_true() -> None:
    result = doctest.testmod(api, optionflags=doctest.NORMALIZE_WHITESPACE)

    assert result.attempted > 3
    assert result.failed == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_workflow_from_conversion_to_restored_model(family: Family, tmp_path: Path) -> None:
    model = family.make()
    assert modewright.plan(model, MODES).ok
    assert not modewright.is_converted(model)
    model = modewright.apply_mode(model, MODES)
    path = modewright.save(model, tmp_path / "m.safetensors")

    assert modewright.last_mode(model) == "max_calibrate"
    assert modewright.verify(path).modes == ("quantize", "max_calibrate")
    assert [m["name"] for m in modewright.inspect(path).modes] == ["quantize", "max_calibrate"]
    restored = modewright.restore(family.make(), path)
    assert content(family.run(restored)) == content(family.run(model))
    rebuilt = modewright.restore_from_mode_state(family.make(), modewright.mode_state(model))
    assert list(rebuilt.state_dict()) == list(model.state_dict())
    modewright.remove_mode_state(model)
    assert not modewright.is_converted(model)


def test_own_registry_is_used_everywhere(tmp_path: Path) -> None:
    registry = example_registry()
    model = modewright.apply_mode(MLP.make(), "gain", registry=registry)
    path = modewright.save(model, tmp_path / "folder")

    assert modewright.plan(MLP.make(), "gain", registry=registry).ok
    assert not modewright.plan(MLP.make(), "gain").ok
    assert modewright.verify(path, registry=registry).modes == ("gain",)
    assert contents(modewright.restore(MLP.make(), path, registry=registry)) == contents(model)
    state = modewright.mode_state(model)
    assert modewright.restore_from_mode_state(MLP.make(), state, registry=registry) is not None
    for use in (
        lambda: modewright.apply_mode(MLP.make(), "gain"),
        lambda: modewright.restore(MLP.make(), path),
        lambda: modewright.verify(path),
        lambda: modewright.restore_from_mode_state(MLP.make(), state),
    ):
        with pytest.raises((UnknownModeError, CheckpointError), match="'gain'"):
            use()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w8a16", "w4a16"])
def test_quantize_is_the_two_modes(scheme: str) -> None:
    one = modewright.quantize(CNN.make(), scheme, calibration=CNN.batches)
    two = modewright.apply_mode(
        CNN.make(),
        [("quantize", {"scheme": scheme}), "max_calibrate"],
        mode_kwargs={"calibration": CNN.batches},
    )

    assert contents(one) == contents(two)
    names = [m["name"] for m in modewright.mode_state(one)["modes"]]
    assert names == ["quantize", "max_calibrate"]


def test_quantize_takes_further_fields_as_dict_or_config() -> None:
    from modewright.quantization.config import QuantizeConfig

    for config in ({"ignore": ["head"]}, QuantizeConfig(scheme="w8a16", ignore=("head",))):
        model = modewright.quantize(MLP.make(), "w8a16", config=config)
        layers = modewright.mode_state(model)["modes"][0]["metadata"]["layers"]
        assert "head" not in layers
        assert "blocks.0.fc1" in layers


def test_quantize_names_what_is_wrong() -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"scheme": "w8a61"}, ConfigError, "w8a16"),
        ({"scheme": "w8a8_static"}, ApplyModeError, "need data"),
        ({"config": {"ignor": []}}, ConfigError, "ignore"),
    ]
    for arguments, kind, text in bad:
        with pytest.raises(kind, match=text):
            modewright.quantize(LM.make(), **arguments)


def test_quantized_model_stays_close_to_the_model() -> None:
    model = modewright.quantize(MLP.make(), "w8a8")

    torch.testing.assert_close(MLP.run(model), MLP.run(MLP.make()), rtol=0.05, atol=0.05)
