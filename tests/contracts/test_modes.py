# SPDX-License-Identifier: Apache-2.0
"""What the engine promises about any mode holds for every registered one.

A mode that is registered without a row in ``REACH`` makes a test fail: add a row that says how the
mode is reached.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import nn

from modewright.api import mode_state, restore_from_mode_state
from modewright.builtin_modes import BUILTIN_MODES, default_registry
from modewright.modes.apply import apply_mode
from modewright.modes.config import ModeConfig
from modewright.modes.contract import check_mode
from modewright.modes.registry import ModeRegistry
from support.example_modes import example_registry, make_mode
from support.models import CNN, FAMILIES, LM, MLP, MOE, STREAM, Family

CALIBRATION = "the family's batches"
SEARCHED = ("w4a16_asym", "w8a8_static", "nvfp4", "mxfp4")
SCHEMES = ("w8a8", "w8a8_static", "w8a16", "w4a16")


@dataclass(frozen=True)
class Reach:
    """How a mode is reached: what comes before, and with which configs it is tried."""

    configs: dict[str, Any] = field(default_factory=lambda: {"defaults": None})
    before: dict[str, list[Any]] = field(default_factory=lambda: {"nothing": []})
    calibrated: bool = False
    families: tuple[Family, ...] = FAMILIES


def quantized(scheme: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "quantize", {"scheme": scheme, **more}


EMBEDDING_TOO = {
    "targets": ["Linear", "Embedding", "Conv1d", "ConvTranspose1d"],
    "on_unmatched": "report",
}
ALL_LAYERS = {"targets": ["*"], "on_unmatched": "report"}
UNSIGNED = {
    "rules": [
        {"targets": ["Linear"], "weights": {"num_bits": 3, "symmetric": False, "group_size": 5}},
        {"targets": ["Linear"], "output_activations": {"enable": True}},
    ]
}
SPARSE = {
    "2:4": {"min_tokens": 1},
    "tiles": {"pattern": "2x2", "sparsity": 0.25, "min_tokens": 1},
    "allotted, few tokens": {"pattern": "unstructured", "allocation": "error"},
}
SPARSE_CHAIN = ["sparse_magnitude", quantized("w4a16"), "max_calibrate", "export_quantize"]
SPARSE_FAMILIES = tuple(f for f in FAMILIES if f.name not in ("recurrent", "experts"))
REACH: dict[str, Reach] = {
    "fastnas": Reach(configs={"defaults": None, "few": {"kinds": ["ffn"], "divisor": 2}}),
    "gradnas": Reach(),
    "autonas": Reach(),
    "depth": Reach(families=(MLP, STREAM)),
    "minitron": Reach(
        configs={"defaults": None, "width alone": {"depth": False}}, families=(MLP, STREAM)
    ),
    "refit": Reach(
        before={"depth": ["depth"], "minitron": ["minitron"]},
        calibrated=True,
        families=(MLP, STREAM),
    ),
    "export_prune": Reach(
        before={mode: [mode] for mode in ("fastnas", "gradnas", "autonas", "minitron")}
    ),
    "rotate": Reach(
        configs={"defaults": None, "random": {"rotation": "orthogonal", "seed": 3}},
        calibrated=True,
        families=(STREAM,),
    ),
    "sparse_magnitude": Reach(
        configs={
            "2:4": {"pattern": "2:4"},
            "unstructured, allotted": {"pattern": "unstructured", "allocation": "error"},
            "tiles": {"pattern": "2x2", "sparsity": 0.25},
            "everything": {"pattern": "1:2", "targets": ["*"], "on_unmatched": "report"},
        },
        families=(*SPARSE_FAMILIES, MOE),
    ),
    "wanda": Reach(configs=SPARSE, calibrated=True, families=SPARSE_FAMILIES),
    "sparsegpt": Reach(
        configs={**SPARSE, "corrected": {"correct_inputs": True, "min_tokens": 1}},
        calibrated=True,
        families=SPARSE_FAMILIES,
    ),
    "alps": Reach(
        configs={
            "2:4": {"min_tokens": 1, "iterations": 10},
            "trained": {"pattern": "unstructured", "min_tokens": 1, "epochs": 1},
        },
        calibrated=True,
        families=SPARSE_FAMILIES,
    ),
    "export_sparse": Reach(
        before={"magnitude": ["sparse_magnitude"], "quantized between": [*SPARSE_CHAIN]},
        families=(*SPARSE_FAMILIES, MOE),
    ),
    "quantize": Reach(
        configs={
            **{scheme: {"scheme": scheme} for scheme in SCHEMES},
            "embedding too": {"scheme": "w8a16", **EMBEDDING_TOO},
            "unsigned groups and outputs": {"scheme": "w8a8", **UNSIGNED},
        }
    ),
    "max_calibrate": Reach(
        before={
            **{scheme: [quantized(scheme)] for scheme in SCHEMES},
            "embedding too": [quantized("w4a16", **EMBEDDING_TOO)],
            "unsigned groups and outputs": [quantized("w8a8_static", **UNSIGNED)],
        },
        calibrated=True,
    ),
    "percentile": Reach(
        before={"static": [quantized("w8a8_static")], "groups": [quantized("w4a16")]},
        calibrated=True,
    ),
    "entropy": Reach(before={"static": [quantized("w8a8_static")]}, calibrated=True),
    "mse": Reach(before={scheme: [quantized(scheme)] for scheme in SEARCHED}, calibrated=True),
    "hqq": Reach(before={scheme: [quantized(scheme)] for scheme in SEARCHED}, calibrated=True),
    "smoothquant": Reach(
        configs={"defaults": None, "not folded": {"fold": False}},
        before={"w8a8": [quantized("w8a8")]},
        calibrated=True,
    ),
    "awq": Reach(
        configs={"defaults": None, "not folded": {"fold": False}},
        before={"w4a16": [quantized("w4a16")]},
        calibrated=True,
    ),
    "hadamard": Reach(
        configs={"defaults": None, "small blocks": {"size": 2, "weights_too": True}},
        before={"w8a8": [quantized("w8a8")], "w4a16": [quantized("w4a16")]},
    ),
    "svdquant": Reach(
        configs={"rank 2": {"rank": 2}},
        before={scheme: [quantized(scheme)] for scheme in ("w4a16", "w8a8")},
        calibrated=True,
    ),
    "bias_correction": Reach(
        before={"w4a16": [quantized("w4a16"), "max_calibrate"], "w8a8": [quantized("w8a8")]},
        calibrated=True,
    ),
    "gptq": Reach(
        configs={"defaults": {"min_tokens": 1}, "corrected": {"correct_inputs": True}},
        before={
            **{scheme: [quantized(scheme)] for scheme in SEARCHED},
            "awq": [quantized("w4a16"), ("awq", {"fold": False})],
        },
        calibrated=True,
    ),
    "learned_rounding": Reach(
        configs={"short": {"iterations": 3}},
        before={
            **{scheme: [quantized(scheme)] for scheme in SEARCHED},
            "gptq": [quantized("w2a16"), ("gptq", {"min_tokens": 1})],
        },
        calibrated=True,
    ),
    "lsq": Reach(
        configs={"short": {"epochs": 1}},
        before={
            **{scheme: [quantized(scheme)] for scheme in SEARCHED},
            "stack": [
                quantized("w2a16"),
                ("gptq", {"min_tokens": 1}),
                ("learned_rounding", {"iterations": 2}),
            ],
        },
        calibrated=True,
    ),
    "auto_quantize": Reach(
        configs={"defaults": None, "few": {"candidates": ["w4a16", "w8a8", "none"]}},
    ),
    "export_quantize": Reach(
        before={
            **{scheme: [quantized(scheme), "max_calibrate"] for scheme in SCHEMES},
            "not calibrated": [quantized("w8a16")],
        },
        calibrated=True,
    ),
    "compress": Reach(
        configs={"defaults": None, "exact": {"scale_dtype": "float32"}},
        before={
            **{scheme: [quantized(scheme), "max_calibrate"] for scheme in (*SCHEMES, *SEARCHED)},
            "everything": [quantized("w4a16", **ALL_LAYERS)],
            "embedding too": [quantized("w4a16_asym", **EMBEDDING_TOO), "mse"],
            "unsigned groups and outputs": [quantized("w8a8_static", **UNSIGNED), "max_calibrate"],
            "chosen codes": [
                quantized("w2a16"),
                ("gptq", {"min_tokens": 1}),
                ("learned_rounding", {"iterations": 2}),
                ("lsq", {"epochs": 1}),
            ],
            "rotated": [quantized("w4a8"), ("hadamard", {"size": 2, "weights_too": True})],
            "scaled, with a branch": [
                quantized("w8a8"),
                ("smoothquant", {"fold": False}),
                ("svdquant", {"rank": 2}),
            ],
        },
        calibrated=True,
    ),
    "decompress": Reach(
        before={
            **{scheme: [quantized(scheme), "max_calibrate", "compress"] for scheme in SCHEMES},
            "everything": [quantized("w4a16", **ALL_LAYERS), "compress"],
            "scaled, with a branch": [
                quantized("w8a8"),
                ("smoothquant", {"fold": False}),
                ("svdquant", {"rank": 2}),
                "compress",
            ],
        },
        calibrated=True,
    ),
}


def rows() -> list[Any]:
    found = []
    for mode, reach in REACH.items():
        for family in reach.families:
            for config in reach.configs:
                for before in reach.before:
                    case = f"{mode}-{family.name}-{config}-after {before}"
                    found.append(pytest.param(mode, family, config, before, id=case))
    return found


@pytest.mark.parametrize("mode", list(default_registry))
def test_every_registered_mode_has_a_row_here(mode: str) -> None:
    assert mode in REACH, (
        f"The mode {mode!r} is registered but not tested: add a row to REACH in {__file__} that "
        "says which modes come before it, with which configs it is tried and whether it needs data."
    )


def test_rows_are_of_modes_that_exist() -> None:
    assert set(REACH) <= set(default_registry)
    assert set(BUILTIN_MODES) <= set(default_registry)


@pytest.mark.parametrize(("mode", "family", "config", "before"), rows())
def test_builtin_mode_keeps_every_promise(
    mode: str, family: Family, config: str, before: str
) -> None:
    reach = REACH[mode]
    data = {"calibration": family.batches} if reach.calibrated else {}
    problems = check_mode(
        mode,
        family.make,
        family.run,
        registry=default_registry,
        config=reach.configs[config],
        mode_kwargs=data,
        before=reach.before[before],
        before_kwargs=data,
    )

    assert problems == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_builtin_mode_changes_what_the_model_computes(family: Family) -> None:
    # Otherwise the checks above would hold for modes that do nothing.
    model = apply_mode(family.make(), quantized("w4a16"), registry=default_registry)

    assert not torch.equal(family.run(model), family.run(family.make()))


# --- the example modes ---------------------------------------------------------------------------

EXAMPLES: dict[str, tuple[str, Any, list[Any]]] = {
    "properties": ("gain", {"factor": 0.5}, []),
    "properties after another": ("gain", None, ["random_mask"]),
    "search space": ("widths", {"choices": [4, 8]}, []),
    "export": ("export_widths", None, ["widths"]),
    "random and in place": ("random_mask", {"keep": 0.25}, []),
    "random after export": ("random_mask", None, ["widths", "export_widths"]),
    "does nothing": ("scripted", None, []),
}


@pytest.mark.parametrize("family", [MLP, LM], ids=lambda family: family.name)
@pytest.mark.parametrize(("mode", "config", "before"), EXAMPLES.values(), ids=EXAMPLES)
def test_example_mode_keeps_every_promise(
    mode: str, config: Any, before: list[Any], family: Family
) -> None:
    assert (
        check_mode(
            mode,
            family.make,
            family.run,
            registry=example_registry(),
            config=config,
            before=before,
        )
        == []
    )


def test_mode_that_is_not_saved_keeps_every_promise() -> None:
    def convert(self: object, model: nn.Module, config: Any) -> Any:
        model.head = nn.Sequential(model.head).train(model.head.training)
        return model, {}

    transient = make_mode("transient", save_mode_in_state=False, convert=convert)
    assert check_mode("transient", MLP.make, MLP.run, registry=ModeRegistry([transient])) == []


# --- the checks find faults ----------------------------------------------------------------------


class Careless(ModeConfig):
    undescribed: int = 1
    required: int = Field(description="Has no default.")


def add_layer(self: object, model: nn.Module, config: Any) -> Any:
    model.head = nn.Sequential(model.head)
    return model, {}


def train(self: object, model: nn.Module, config: Any) -> Any:
    model.blocks[0].train()
    return model, {}


def draw_from_elsewhere(self: object, model: nn.Module, config: Any) -> Any:
    model.head.bias = nn.Parameter(torch.tensor(list(os.urandom(4)), dtype=torch.float32))
    return model, {}


def keep_beside_the_state(self: object, model: nn.Module, config: Any) -> Any:
    model.head.register_forward_hook(lambda module, args, output: output * 2)
    return model, {}


def fail_to_restore(self: object, model: nn.Module, config: Any, metadata: Any) -> Any:
    raise ZeroDivisionError("not implemented")


def count(self: Any, model: nn.Module, config: Any, metadata: dict[str, Any]) -> None:
    self.__class__.number = getattr(self, "number", 0) + 1
    metadata["number"] = self.number


def change_dtype(self: object, model: nn.Module, config: Any, metadata: Any) -> nn.Module:
    return model.half()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "adds layers it does not restore": ({"convert": add_layer}, "other modules"),
    "leaves train flags changed": ({"convert": train}, "train flag of ['blocks.0'"),
    "is not deterministic": ({"convert": draw_from_elsewhere}, "different outputs"),
    "keeps something beside the state": ({"convert": keep_beside_the_state}, "gives other outputs"),
    "cannot restore": ({"restore": fail_to_restore}, "cannot be saved and restored"),
    "restores another dtype": ({"restore": change_dtype}, "dtypes than convert"),
    "edits more at every reading": ({"update_for_save": count}, "twice gives two different"),
}


@pytest.mark.parametrize(("members", "text"), FAULTS.values(), ids=FAULTS)
def test_check_finds_a_mode_that(members: dict[str, Any], text: str) -> None:
    registry = ModeRegistry([make_mode("faulty", **members)])

    problems = check_mode("faulty", MLP.make, MLP.run, registry=registry)
    assert any(text in problem for problem in problems), problems


def test_check_finds_config_fields_without_default_or_description() -> None:
    registry = ModeRegistry([make_mode("faulty", config_class=Careless)])

    problems = check_mode("faulty", MLP.make, MLP.run, registry=registry, config={"required": 1})
    assert problems == [
        "config field 'undescribed' has no description",
        "config field 'required' has no default",
    ]


def test_check_finds_a_mode_that_is_not_recorded() -> None:
    def rename(self: object, model: nn.Module, config: Any) -> Any:
        type(self).name = "renamed"
        return model, {}

    registry = ModeRegistry([make_mode("faulty", convert=rename)])
    problems = check_mode("faulty", MLP.make, MLP.run, registry=registry)
    assert "the mode was not recorded" in problems


# --- a recorded state restores with nothing but names --------------------------------------------


@pytest.mark.parametrize("family", [CNN, LM], ids=lambda family: family.name)
def test_state_of_builtin_modes_is_restored_through_the_public_functions(family: Family) -> None:
    model = apply_mode(
        family.make(), [quantized("w8a8"), "max_calibrate"], registry=default_registry
    )
    restored = restore_from_mode_state(family.make(), mode_state(model))

    assert list(restored.state_dict()) == list(model.state_dict())
