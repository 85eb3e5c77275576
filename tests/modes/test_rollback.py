# SPDX-License-Identifier: Apache-2.0
"""A conversion that fails leaves the model exactly as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from modewright.errors import ApplyModeError, ConfigError
from modewright.modes.apply import apply_mode
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import STATE_ATTRIBUTE
from support.example_modes import GainConfig, ScriptedMode, example_registry, make_mode
from support.models import Block
from support.photograph import Photograph

Script = Callable[[nn.Module], object]


class Rich(nn.Module):
    """A model with one of everything that a mode might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Block(4, 6))
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.body[0].weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("expanded", torch.zeros(1).expand(5))
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)
        self.register_buffer("none", None)
        self.lane = torch.arange(8.0)[2:6]
        self.names = ["a", "b"]
        self.options = {"x": 1}
        self.empty: list[int] = []
        self.plain = "text"
        self.body[0].register_forward_hook(lambda module, args, output: output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.body(x))


def make_rich() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Rich()
        model(torch.randn(3, 4)).sum().backward()
    return model


def first(model: nn.Module) -> nn.Linear:
    return model.body[0]


@torch.no_grad()
def write_in_place(model: nn.Module) -> None:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.stride() != (0,):
            tensor.add_(1)
    model.hidden.zero_()


def write_through_data(model: nn.Module) -> None:
    first(model).weight.data.mul_(2)
    model.steps.data += 1


def write_with_gradient(model: nn.Module) -> None:
    model.hidden.mul_(first(model).bias)


def replace_forward(model: nn.Module) -> None:
    first(model).forward = lambda x: x * 0


def train_step(model: nn.Module) -> None:
    model.train()
    model(torch.ones(5, 4)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def apply_hook(model: nn.Module) -> None:
    first(model)._forward_hooks.clear()
    first(model).register_forward_pre_hook(lambda module, args: None)
    model.register_full_backward_hook(lambda module, grad_in, grad_out: None)


SCRIPTS: dict[str, Script] = {
    "replaces a parameter": lambda m: setattr(first(m), "weight", nn.Parameter(torch.zeros(4, 4))),
    "replaces parameters by others' shapes": lambda m: setattr(
        m.body[2], "fc1", nn.Linear(4, 2, dtype=torch.float64)
    ),
    "writes in place": write_in_place,
    "writes through data": write_through_data,
    "writes with gradient": write_with_gradient,
    "assigns data": lambda m: setattr(first(m).bias, "data", torch.full((4,), 9.0)),
    "changes dtype": lambda m: m.half(),
    "changes dtype twice": lambda m: m.bfloat16().double(),
    "moves to meta": lambda m: m.to("meta"),
    "shrinks a parameter": lambda m: setattr(first(m).bias, "data", torch.ones(2)),
    "changes classes": lambda m: setattr(m.body[2], "__class__", nn.Identity),
    "changes the root's class": lambda m: setattr(m, "__class__", nn.Sequential),
    "adds a parameter": lambda m: first(m).register_parameter("more", nn.Parameter(torch.ones(1))),
    "removes a parameter": lambda m: delattr(first(m), "bias"),
    "turns a parameter to None": lambda m: setattr(first(m), "bias", None),
    "unties": lambda m: setattr(m.tied, "weight", nn.Parameter(m.tied.weight.detach().clone())),
    "adds a buffer": lambda m: m.register_buffer("more", torch.ones(1)),
    "replaces a buffer": lambda m: setattr(m, "steps", torch.tensor(9)),
    "fills a buffer that was None": lambda m: setattr(m, "none", torch.ones(1)),
    "makes a buffer persistent": lambda m: m._non_persistent_buffers_set.clear(),
    "removes a buffer": lambda m: delattr(m, "hidden"),
    "writes into an expanded buffer": lambda m: m.expanded.as_strided((1,), (1,)).fill_(5),
    "removes a child": lambda m: delattr(m, "tied"),
    "replaces a child": lambda m: m.body.__setitem__(0, nn.Identity()),
    "appends a child": lambda m: m.body.append(nn.Linear(4, 4)),
    "reorders children": lambda m: m._modules.update(body=m._modules.pop("body")),
    "changes hooks": apply_hook,
    "replaces forward": replace_forward,
    "changes train flags": lambda m: m.eval(),
    "changes one train flag": lambda m: m.body[1].eval(),
    "freezes": lambda m: m.requires_grad_(False),
    "thaws": lambda m: m.frozen.requires_grad_(True),
    "drops gradients": lambda m: m.zero_grad(set_to_none=True),
    "zeroes gradients": lambda m: m.zero_grad(set_to_none=False),
    "accumulates gradients": train_step,
    "appends to a list": lambda m: m.names.append("c"),
    "empties a list": lambda m: m.names.clear(),
    "fills an empty list": lambda m: m.empty.append(1),
    "changes a dict": lambda m: m.options.update(x=2, y=3),
    "replaces an attribute": lambda m: setattr(m, "plain", "other"),
    "deletes an attribute": lambda m: delattr(m, "names"),
    "adds an attribute": lambda m: setattr(m, "more", object()),
    "drops the state": lambda m: vars(m).pop(STATE_ATTRIBUTE, None),
    "parametrizes": lambda m: parametrizations.weight_norm(m.body[2].fc1),
    "normalizes spectrally": lambda m: parametrizations.spectral_norm(m.body[2].fc2),
    "calibrates in eval mode": lambda m: m.eval()(torch.ones(2, 4)),
    "runs in train mode": lambda m: m.train()(torch.randn(6, 4)),
}


def apply_scripted(model: nn.Module, *, error: BaseException | None = None, **kwargs: Any) -> None:
    apply_mode(
        model,
        ["scripted"],
        registry=example_registry(),
        mode_kwargs={"error": error, **kwargs},
    )


@pytest.mark.parametrize("converted", [False, True], ids=["fresh", "converted"])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_failure_after_a_change_undoes_it(script: Script, converted: bool) -> None:
    model = make_rich()
    if converted:
        apply_scripted(model)
    before = Photograph(model)

    with pytest.raises(ApplyModeError, match="The model is as it was") as caught:
        apply_scripted(model, script=script, error=ValueError("half-way"))

    assert before.differences(model) == []
    assert isinstance(caught.value.cause, ValueError)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_do_change_the_model(script: Script) -> None:
    model = make_rich()
    before = Photograph(model)
    if script is SCRIPTS["drops the state"]:
        apply_scripted(model)
        before = Photograph(model)
    script(model)

    assert before.differences(model) != []


@given(st.lists(st.sampled_from(list(SCRIPTS)), min_size=2, max_size=6))
@settings(max_examples=150)
def test_failure_after_any_series_of_changes_undoes_them(names: list[str]) -> None:
    model = make_rich()
    before = Photograph(model)

    def script(model: nn.Module) -> None:
        for name in names:
            SCRIPTS[name](model)  # one may fail on what another left, which is a failure as well
        raise ValueError("at the end")

    with pytest.raises(ApplyModeError):
        apply_scripted(model, script=script)

    assert before.differences(model) == []


# --- kinds of failure ----------------------------------------------------------------------------

RESULTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "none": (lambda m: (None, {}), "returned None in place of the model"),
    "model only": (lambda m: m, "must return"),
    "list": (lambda m: [m, {}], "must return"),
    "four parts": (lambda m: (m, None, {}, 1), "must return"),
    "another type": (lambda m: ("model", {}), "it returned str"),
    "foreign config": (lambda m: (m, GainConfig(), {}), "GainConfig"),
    "metadata none": (lambda m: (m, None), "dict of metadata"),
    "metadata list": (lambda m: (m, [1]), "dict of metadata"),
    "set in metadata": (lambda m: (m, {"a": {1, 2}}), r"metadata of mode 'scripted'\.a is a"),
    "nan in metadata": (lambda m: (m, {"a": [math.nan]}), r"\.a\[0\] is nan"),
    "object in metadata": (lambda m: (m, {"a": {"b": object()}}), r"\.a\.b is a builtins\.object"),
    "module in metadata": (lambda m: (m, {"a": m}), "only JSON values"),
    "reserved key": (lambda m: (m, {"$tensor": 1}), "do not start with"),
}


@pytest.mark.parametrize(("result", "text"), RESULTS.values(), ids=RESULTS)
def test_result_of_another_form_is_a_failure(result: Callable[..., Any], text: str) -> None:
    model = make_rich()
    before = Photograph(model)

    with pytest.raises(ApplyModeError, match=text):
        apply_scripted(model, script=SCRIPTS["changes classes"], result=result)

    assert before.differences(model) == []


def test_convert_that_returns_none_failed() -> None:
    with pytest.raises(ApplyModeError, match="convert returned None"):
        apply_scripted(make_rich(), result=lambda m: None)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupt_rolls_back_and_stays_what_it_is(kind: type[BaseException]) -> None:
    model = make_rich()
    before = Photograph(model)
    interrupt = kind()

    with pytest.raises(kind) as caught:
        apply_scripted(model, script=SCRIPTS["changes dtype"], error=interrupt)

    assert caught.value is interrupt
    assert before.differences(model) == []


def test_error_names_the_mode_its_place_and_the_cause() -> None:
    modes = [make_mode("fine"), ScriptedMode]
    with pytest.raises(ApplyModeError) as caught:
        apply_mode(
            make_rich(),
            modes,
            registry=ModeRegistry(),
            mode_kwargs=[{}, {"error": ZeroDivisionError("a third")}],
        )

    error = caught.value
    assert (error.mode, error.index) == ("scripted", 1)
    assert isinstance(error.cause, ZeroDivisionError)
    assert str(error).startswith(
        "Mode 'scripted' (step 2 of 2) could not be applied: ZeroDivisionError: a third"
    )
    assert isinstance(error, RuntimeError)


def test_failure_of_a_later_mode_undoes_the_earlier_ones() -> None:
    model = make_rich()
    before = Photograph(model)

    with pytest.raises(ApplyModeError):
        apply_mode(
            model,
            ["random_mask", "gain", "scripted"],
            registry=example_registry(),
            mode_kwargs=[{}, {}, {"error": ValueError()}],
        )

    assert before.differences(model) == []


def test_failure_of_an_update_hook_undoes_everything() -> None:
    def hook(self: object, model: nn.Module, config: Any, metadata: dict[str, Any]) -> None:
        model.names.append("c")
        metadata["bad"] = {1}

    model = make_rich()
    before = Photograph(model)
    modes = [make_mode("m", update_for_new_mode=hook), make_mode("n")]

    with pytest.raises(ApplyModeError, match="bad is a"):
        apply_mode(model, modes, registry=ModeRegistry())

    assert before.differences(model) == []


def test_failure_after_the_model_was_replaced_leaves_the_old_one_with_its_state() -> None:
    model = make_rich()
    apply_scripted(model)
    before = Photograph(model)
    replaces = make_mode("replaces", convert=lambda self, m, config: (copy.deepcopy(m), {}))

    with pytest.raises(ApplyModeError):
        apply_mode(
            model,
            [replaces, "scripted"],
            registry=example_registry(),
            mode_kwargs=[{}, {"error": ValueError()}],
        )

    assert before.differences(model) == []


def test_config_error_inside_a_conversion_is_an_apply_mode_error() -> None:
    with pytest.raises(ApplyModeError) as caught:
        apply_scripted(make_rich(), error=ConfigError("bad field"))
    assert isinstance(caught.value.cause, ConfigError)


def test_model_can_be_converted_after_a_failure() -> None:
    model = make_rich()
    with pytest.raises(ApplyModeError):
        apply_scripted(model, script=SCRIPTS["changes dtype"], error=ValueError())
    apply_mode(model, "gain", registry=example_registry())

    assert model(torch.ones(2, 4)).isfinite().all()


# --- limits of the promise -----------------------------------------------------------------------


def test_without_atomic_the_model_stays_half_converted_and_the_error_says_so() -> None:
    model = make_rich()
    with pytest.raises(ApplyModeError, match="may be half converted"):
        apply_mode(
            model,
            "scripted",
            registry=example_registry(),
            mode_kwargs={"script": SCRIPTS["changes dtype"], "error": ValueError()},
            atomic=False,
        )

    assert first(model).weight.dtype == torch.float16


def careless_mode() -> Any:
    return type("Careless", (ScriptedMode,), {"name": "careless", "writes_in_place": False})()


def test_mode_that_breaks_its_word_is_named_with_what_it_wrote() -> None:
    model = make_rich()
    before = Photograph(model)

    @torch.no_grad()
    def script(model: nn.Module) -> None:
        model.frozen.add_(1)
        first(model).bias.grad.add_(1)

    with pytest.raises(ApplyModeError, match=r"values of frozen, body\.0\.bias\.grad: the mode"):
        apply_mode(
            model,
            careless_mode(),
            registry=ModeRegistry(),
            mode_kwargs={"script": script, "error": ValueError()},
        )
    assert before.differences(model) == [".frozen", "._parameters", "body.0._parameters"][1:]


def test_mode_that_keeps_its_word_is_undone_without_copies() -> None:
    model = make_rich()
    before = Photograph(model)

    with pytest.raises(ApplyModeError, match=r"The model is as it was\.$"):
        apply_mode(
            model,
            careless_mode(),
            registry=ModeRegistry(),
            mode_kwargs={"script": SCRIPTS["changes dtype"], "error": ValueError()},
        )

    assert before.differences(model) == []


def test_model_made_in_inference_mode_can_be_converted_and_rolled_back() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = Photograph(model)

    with pytest.raises(ApplyModeError, match="as it was"):
        apply_scripted(model, script=lambda m: m.half(), error=ValueError())

    assert before.differences(model) == []
    apply_scripted(model)


def test_model_on_the_meta_device_is_rolled_back() -> None:
    model = nn.Linear(4, 4, device="meta")
    weight = model.weight

    with pytest.raises(ApplyModeError):
        apply_scripted(model, script=lambda m: m.to_empty(device="cpu"), error=ValueError())

    assert model.weight is weight
    assert model.weight.is_meta
