# SPDX-License-Identifier: Apache-2.0
"""Applying modes: how they are written, what is recorded, what surrounds a conversion."""

from __future__ import annotations

import copy
import random
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.api import is_converted, last_mode, mode_state
from modewright.errors import ApplyModeError, ConfigError, IncompatibleModeError, UnknownModeError
from modewright.modes.apply import apply_mode
from modewright.modes.registry import ModeRegistry
from modewright.modes.state import STATE_ATTRIBUTE
from support.example_modes import (
    GainConfig,
    GainMode,
    NoConfig,
    ScriptedMode,
    example_registry,
    make_mode,
)
from support.models import MLP, Mlp
from support.photograph import Photograph, contents


def names(model: nn.Module) -> list[str]:
    return [mode["name"] for mode in mode_state(model)["modes"]]


# --- how modes are written -----------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "name": "gain",
    "descriptor": GainMode(),
    "class": GainMode,
    "pair with a dict": ("gain", {"factor": 2.0}),
    "pair with a config": ("gain", GainConfig(factor=2.0)),
    "pair with None": ("gain", None),
    "pair of a descriptor": (GainMode(), {"factor": 2.0}),
    "pair of a class": (GainMode, None),
    "list of a name": ["gain"],
    "tuple of a name": ("gain",),
    "list of a descriptor": [GainMode()],
    "list of a pair": [("gain", {"factor": 2.0})],
    "list of a list": [["gain", {"factor": 2.0}]],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_modes_can_be_written_in_many_ways(form: Any, registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), form, registry=registry)

    assert mode_state(model)["modes"][0]["config"] == {"factor": 2.0}
    assert names(model) == ["gain"]
    assert MLP.run(model).shape == (3, 4)


BAD_FORMS: dict[str, Any] = {
    "number": 3,
    "dict": {"gain": {}},
    "config only": GainConfig(),
    "pair with a number": ("gain", 3),
    "list with a dict": ["gain", {"factor": 2.0}],
    "nested lists": [[["gain", None]]],
    "class that is no mode": dict,
}


@pytest.mark.parametrize("form", BAD_FORMS.values(), ids=BAD_FORMS)
def test_other_forms_are_refused_and_the_right_ones_shown(
    form: Any, registry: ModeRegistry
) -> None:
    with pytest.raises(ConfigError, match="A mode is written as a name"):
        apply_mode(MLP.make(), form, registry=registry)


@pytest.mark.parametrize("nothing", [None, [], ()], ids=repr)
def test_no_mode_leaves_the_model_and_records_nothing(nothing: Any, registry: ModeRegistry) -> None:
    model = MLP.make()
    before = Photograph(model)

    assert apply_mode(model, nothing, registry=registry) is model
    assert before.differences(model) == []
    assert not is_converted(model)


def test_several_modes_are_applied_and_recorded_in_order(registry: ModeRegistry) -> None:
    model = MLP.make()
    result = apply_mode(model, ["widths", "export_widths", ("gain", None)], registry=registry)

    assert result is model
    assert names(model) == ["widths", "export_widths", "gain"]
    assert last_mode(model) == "gain"


def test_descriptor_need_not_be_registered_to_be_applied(registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), make_mode("elsewhere"), registry=registry)

    assert names(model) == ["elsewhere"]


def test_descriptor_under_the_name_of_another_mode_is_refused(registry: ModeRegistry) -> None:
    with pytest.raises(ConfigError, match=r"belongs to support\.example_modes\.GainMode"):
        apply_mode(MLP.make(), make_mode("gain"), registry=registry)


def test_rules_of_an_unregistered_descriptor_are_checked(registry: ModeRegistry) -> None:
    with pytest.raises(UnknownModeError, match="names 'nowhere'"):
        apply_mode(MLP.make(), make_mode("x", next_modes={"nowhere"}), registry=registry)


def test_unregistered_modes_of_one_sequence_know_each_other(registry: ModeRegistry) -> None:
    modes = [make_mode("x", export_mode="y"), make_mode("y", is_export_mode=True)]

    assert names(apply_mode(MLP.make(), modes, registry=registry)) == ["x", "y"]


# --- everything is checked before anything is done -----------------------------------------------

DOOR: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown second name": (["scripted", "nope"], UnknownModeError, "nope"),
    "bad second config": (
        ["scripted", ("gain", {"factor": -1})],
        ConfigError,
        r"'gain' \(step 2 of 2\)",
    ),
    "unknown key": ([("scripted", {"x": 1})], ConfigError, "no such field"),
    "order": (["scripted", "export_widths"], IncompatibleModeError, "Step 2 of 2"),
    "order after what was applied": (["gain"], IncompatibleModeError, "prohibits"),
}


@pytest.mark.parametrize(("modes", "kind", "text"), DOOR.values(), ids=DOOR)
def test_mistake_anywhere_in_the_sequence_runs_no_conversion(
    modes: Any, kind: type[Exception], text: str, registry: ModeRegistry
) -> None:
    ran: list[object] = []
    model = apply_mode(MLP.make(), "gain", registry=registry)
    before = Photograph(model)

    with pytest.raises(kind, match=text):
        apply_mode(model, modes, registry=registry, mode_kwargs={"script": ran.append})

    assert ran == []
    assert before.differences(model) == []


def test_update_hook_of_the_last_mode_does_not_run_when_the_check_fails(
    registry: ModeRegistry,
) -> None:
    model = apply_mode(MLP.make(), "gain", registry=registry)
    with pytest.raises(IncompatibleModeError):
        apply_mode(model, ["gain"], registry=registry)

    assert mode_state(model)["modes"][0]["metadata"]["new_modes"] == 0


def test_bad_config_of_the_first_mode_leaves_no_state(registry: ModeRegistry) -> None:
    model = MLP.make()
    with pytest.raises(ConfigError):
        apply_mode(model, ("gain", {"factor": "much"}), registry=registry)

    assert not is_converted(model)
    assert STATE_ATTRIBUTE not in vars(model)
    apply_mode(model, "gain", registry=registry, init_state=True)


def test_preview_of_the_first_mode_is_asked_before_anything_changes() -> None:
    def refuse(self: object, model: nn.Module, config: NoConfig) -> list[str]:
        raise ConfigError("nothing matches")

    model = MLP.make()
    before = Photograph(model)
    with pytest.raises(ConfigError, match="nothing matches"):
        apply_mode(model, make_mode("picky", preview=refuse), registry=ModeRegistry())
    assert before.differences(model) == []


# --- mode_kwargs ---------------------------------------------------------------------------------


def received(kwargs: Any, count: int = 2) -> list[dict[str, Any]]:
    got: list[dict[str, Any]] = []

    def convert(self: object, model: nn.Module, config: NoConfig, **kw: Any) -> Any:
        got.append(kw)
        return model, {}

    modes = [make_mode(f"m{i}", convert=convert) for i in range(count)]
    apply_mode(MLP.make(), modes, registry=ModeRegistry(), mode_kwargs=kwargs)
    return got


def test_one_dict_is_for_all_modes() -> None:
    assert received({"data": 1}) == [{"data": 1}, {"data": 1}]


def test_list_has_a_dict_or_none_for_each_mode() -> None:
    assert received([{"data": 1}, None]) == [{"data": 1}, {}]
    assert received(None) == [{}, {}]


def test_mode_that_edits_its_kwargs_does_not_reach_the_next_one() -> None:
    def convert(self: object, model: nn.Module, config: NoConfig, **kw: Any) -> Any:
        kw["data"] = "changed"
        return model, {}

    given = {"data": 1}
    modes = [make_mode(f"m{i}", convert=convert) for i in range(2)]
    apply_mode(MLP.make(), modes, registry=ModeRegistry(), mode_kwargs=given)
    assert given == {"data": 1}


BAD_KWARGS: dict[str, Any] = {
    "too few": [{}],
    "too many": [{}, {}, {}],
    "no dict": [{}, 3],
    "number": 3,
    "text": "data",
}


@pytest.mark.parametrize("kwargs", BAD_KWARGS.values(), ids=BAD_KWARGS)
def test_mode_kwargs_of_another_form_are_refused(kwargs: Any) -> None:
    with pytest.raises(ConfigError, match="mode_kwargs must be"):
        received(kwargs)


def test_mode_kwargs_are_not_recorded(registry: ModeRegistry) -> None:
    secret = "not-to-be-recorded"
    model = apply_mode(
        MLP.make(), "scripted", registry=registry, mode_kwargs={"script": lambda m: secret}
    )

    assert "script" not in str(mode_state(model)["modes"][0]["config"])


# --- init_state ----------------------------------------------------------------------------------


def test_init_state_true_demands_a_model_without_state(registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), "widths", registry=registry, init_state=True)

    with pytest.raises(IncompatibleModeError, match="modes were applied to this one: widths"):
        apply_mode(model, "export_widths", registry=registry, init_state=True)


def test_init_state_false_demands_a_model_with_state(registry: ModeRegistry) -> None:
    model = MLP.make()
    with pytest.raises(IncompatibleModeError, match="no mode was applied"):
        apply_mode(model, "widths", registry=registry, init_state=False)

    apply_mode(model, "widths", registry=registry)
    apply_mode(model, "export_widths", registry=registry, init_state=False)


# --- recipes of models ---------------------------------------------------------------------------


def build_mlp(features: int = 8, *, hidden: int = 12) -> nn.Module:
    return Mlp(features, hidden)


MODEL_LIKES: dict[str, Any] = {
    "class": Mlp,
    "function": build_mlp,
    "class alone": (Mlp,),
    "with arguments": (Mlp, (8,)),
    "with a list": (build_mlp, [8]),
    "with keywords": (build_mlp, (8,), {"hidden": 16}),
}


@pytest.mark.parametrize("like", MODEL_LIKES.values(), ids=MODEL_LIKES)
@pytest.mark.parametrize("modes", [["gain"], []], ids=["a mode", "no mode"])
def test_recipe_of_a_model_is_built(like: Any, modes: Any, registry: ModeRegistry) -> None:
    model = apply_mode(like, modes, registry=registry)

    assert isinstance(model, Mlp)
    assert is_converted(model) is bool(modes)


BAD_MODELS: dict[str, Any] = {
    "none": None,
    "number": 3,
    "text": "model",
    "module in a tuple": (nn.Linear(2, 2), (1,)),
    "arguments no tuple": (Mlp, 8),
    "keywords no dict": (Mlp, (), [8]),
    "four parts": (Mlp, (), {}, None),
    "empty tuple": (),
}


@pytest.mark.parametrize("like", BAD_MODELS.values(), ids=BAD_MODELS)
def test_other_models_are_refused(like: Any, registry: ModeRegistry) -> None:
    with pytest.raises(ConfigError, match="The model must be"):
        apply_mode(like, "gain", registry=registry)


def test_recipe_that_builds_something_else_is_an_error(registry: ModeRegistry) -> None:
    with pytest.raises(ApplyModeError, match="returned int"):
        apply_mode((int, (3,)), "gain", registry=registry)


def test_mode_may_ask_for_the_recipe() -> None:
    def convert(self: object, recipe: Any, config: NoConfig) -> Any:
        return recipe.factory(*recipe.args, hidden=16), {"class": recipe.factory.__name__}

    mode = make_mode("wants_recipe", require_model_like=True, convert=convert)
    model = apply_mode((Mlp, (8,)), [mode, GainMode], registry=ModeRegistry())

    assert model.blocks[0].fc1.out_features == 16
    assert mode_state(model)["modes"][0]["metadata"] == {"class": "Mlp"}


def test_mode_may_hand_the_recipe_on_and_the_engine_builds_it() -> None:
    mode = make_mode("looks", require_model_like=True)
    model = apply_mode((Mlp, (8,)), [mode, GainMode], registry=ModeRegistry())

    assert isinstance(model, Mlp)
    assert names(model) == ["looks", "gain"]


@pytest.mark.parametrize("first", [True, False], ids=["module", "second step"])
def test_mode_that_needs_the_recipe_refuses_a_module(first: bool) -> None:
    mode = make_mode("wants_recipe", require_model_like=True)
    like, modes = (MLP.make(), [mode]) if first else (Mlp, [GainMode, mode])

    with pytest.raises(IncompatibleModeError, match="needs the recipe"):
        apply_mode(like, modes, registry=ModeRegistry())


# --- wrappers ------------------------------------------------------------------------------------


def test_data_parallel_is_looked_through_and_returned(registry: ModeRegistry) -> None:
    wrapper = nn.DataParallel(MLP.make())
    inner = wrapper.module

    assert apply_mode(wrapper, "gain", registry=registry) is wrapper
    assert wrapper.module is inner
    assert is_converted(wrapper)
    assert is_converted(inner)
    assert last_mode(wrapper) == "gain"


def test_wrapper_holds_the_model_that_a_mode_put_in_the_place_of_its_own() -> None:
    replaces = make_mode("replaces", convert=lambda self, model, config: (copy.deepcopy(model), {}))
    wrapper = nn.DataParallel(MLP.make())
    before = wrapper.module
    apply_mode(wrapper, replaces, registry=ModeRegistry())

    assert wrapper.module is not before
    assert is_converted(wrapper)
    assert not is_converted(before)


@pytest.fixture
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_is_looked_through(registry: ModeRegistry) -> None:
    wrapper = nn.parallel.DistributedDataParallel(MLP.make())

    assert apply_mode(wrapper, "gain", registry=registry) is wrapper
    assert is_converted(wrapper.module)


@pytest.mark.usefixtures("process_group")
def test_replaced_parameters_in_distributed_data_parallel_are_said() -> None:
    wrapper = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4)))
    modewright.quantize(wrapper, "w8a16")

    with pytest.warns(UserWarning, match="wrap it anew"):
        modewright.apply_mode(wrapper, "export_quantize")


def test_compiled_model_is_looked_through(registry: ModeRegistry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(MLP.make(), backend="eager")
    inner = compiled._orig_mod

    assert apply_mode(compiled, "gain", registry=registry) is inner
    assert is_converted(compiled)


def test_sharded_model_is_refused_with_the_way_out(registry: ModeRegistry) -> None:
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()

    with pytest.raises(IncompatibleModeError, match="then shard"):
        apply_mode(sharded, "gain", registry=registry)


# --- what is recorded ----------------------------------------------------------------------------


def test_config_that_convert_returns_is_the_one_recorded(registry: ModeRegistry) -> None:
    other = make_mode(
        "other",
        config_class=GainConfig,
        convert=lambda self, model, config: (
            model,
            config.model_copy(update={"factor": 3.0}),
            {"seen": config.factor},
        ),
    )
    model = apply_mode(MLP.make(), (other, {"factor": 1.5}), registry=registry)

    recorded = mode_state(model)["modes"][0]
    assert recorded["config"] == {"factor": 3.0}
    assert recorded["metadata"] == {"seen": 1.5}


def test_state_says_how_a_record_came_about(registry: ModeRegistry) -> None:
    torch.manual_seed(123)
    state = mode_state(apply_mode(MLP.make(), "gain", registry=registry))

    assert state["schema_version"] == 1
    origin = state["provenance"][0]
    assert origin["seed"] == 123
    assert origin["owner"] == "support.example_modes.GainMode"
    assert origin["modewright_version"] == state["modewright_version"]


def test_update_for_new_mode_runs_between_every_two_modes() -> None:
    calls: list[tuple[str, list[str]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(self: object, model: nn.Module, config: Any, metadata: dict[str, Any]) -> None:
            calls.append((name, list(metadata)))
            metadata["followed"] = True

        return hook

    modes = [make_mode(f"m{i}", update_for_new_mode=note(f"m{i}")) for i in range(3)]
    model = apply_mode(MLP.make(), modes, registry=ModeRegistry())
    assert calls == [("m0", []), ("m1", [])]

    apply_mode(model, make_mode("m3"), registry=ModeRegistry())
    assert calls == [("m0", []), ("m1", []), ("m2", [])]
    metadata = [mode["metadata"] for mode in mode_state(model)["modes"]]
    assert metadata == [{"followed": True}] * 3 + [{}]


def test_update_hook_may_assign_to_its_config_and_the_record_holds_that() -> None:
    def hook(self: object, model: nn.Module, config: GainConfig, metadata: Any) -> None:
        config.factor = 7.0

    mode = make_mode("m", config_class=GainConfig, update_for_new_mode=hook)
    model = apply_mode(MLP.make(), [mode, make_mode("n")], registry=ModeRegistry())

    assert mode_state(model)["modes"][0]["config"] == {"factor": 7.0}


def test_hook_set_on_the_descriptor_itself_runs_too() -> None:
    mode = make_mode("m")
    mode.update_for_new_mode = lambda model, config, metadata: metadata.update(ran=True)
    model = apply_mode(MLP.make(), [mode, make_mode("n")], registry=ModeRegistry())

    assert mode_state(model)["modes"][0]["metadata"] == {"ran": True}


def test_metadata_shares_no_tensor_with_the_model() -> None:
    mode = make_mode("m", convert=lambda self, model, config: (model, {"w": model.head.weight}))
    model = apply_mode(MLP.make(), mode, registry=ModeRegistry())
    recorded = mode_state(model)["modes"][0]["metadata"]["w"]
    with torch.no_grad():
        model.head.weight.zero_()

    assert recorded.abs().sum() > 0
    assert mode_state(model)["modes"][0]["metadata"]["w"].equal(recorded)
    assert not recorded.requires_grad


# --- random numbers ------------------------------------------------------------------------------


def test_random_numbers_of_the_user_go_on_as_if_no_mode_ran(registry: ModeRegistry) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    model = MLP.make()
    apply_mode(model, "random_mask", registry=registry)

    assert torch.rand(4).equal(expected)


def test_mode_draws_the_same_numbers_after_the_same_seed(registry: ModeRegistry) -> None:
    def converted(seed: int) -> nn.Module:
        model = MLP.make()
        torch.manual_seed(seed)
        torch.rand(random.Random(0).randint(1, 5))  # where the stream stands does not matter
        return apply_mode(model, "random_mask", registry=registry)

    assert contents(converted(1)) == contents(converted(1))
    assert contents(converted(1)) != contents(converted(2))


def test_random_numbers_of_the_user_go_on_after_a_failure(registry: ModeRegistry) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with pytest.raises(ApplyModeError):
        apply_mode(
            MLP.make(),
            "scripted",
            registry=registry,
            mode_kwargs={"script": lambda m: torch.rand(9), "error": ValueError("x")},
        )

    assert torch.rand(4).equal(expected)


# --- the state and the module tree ---------------------------------------------------------------


def test_state_on_a_submodule_is_an_error_that_names_it(registry: ModeRegistry) -> None:
    model = MLP.make()
    apply_mode(model.blocks[1], ScriptedMode, registry=registry)

    for use in (is_converted, last_mode, mode_state):
        with pytest.raises(IncompatibleModeError, match=r"'blocks\.1' holds a mode state"):
            use(model)
    with pytest.raises(IncompatibleModeError, match=r"remove_mode_state"):
        apply_mode(model, "gain", registry=registry)


def test_mode_that_leaves_a_state_inside_its_result_fails() -> None:
    class Pair(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.student, self.teacher = model, copy.deepcopy(model)

    pairs = make_mode("pairs", convert=lambda self, model, config: (Pair(model), {}))
    model = apply_mode(MLP.make(), make_mode("first"), registry=ModeRegistry())
    before = Photograph(model)

    with pytest.raises(ApplyModeError, match="'teacher' holds a mode state"):
        apply_mode(model, pairs, registry=ModeRegistry())
    assert before.differences(model) == []


def test_mode_may_put_the_model_into_another_one() -> None:
    wraps = make_mode("wraps", convert=lambda self, model, config: (nn.Sequential(model), {}))
    inner = apply_mode(MLP.make(), make_mode("first"), registry=ModeRegistry())
    outer = apply_mode(inner, wraps, registry=ModeRegistry())

    assert names(outer) == ["first", "wraps"]
    assert not is_converted(inner)


def test_module_without_children_or_length_can_hold_a_state() -> None:
    empty = nn.Sequential()
    apply_mode(empty, make_mode("m"), registry=ModeRegistry())

    assert is_converted(empty)
    assert names(empty) == ["m"]


def test_deep_copy_carries_the_state_and_shares_none_of_it(registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), "widths", registry=registry)
    twin = copy.deepcopy(model)
    apply_mode(twin, "export_widths", registry=registry)

    assert names(model) == ["widths"]
    assert names(twin) == ["widths", "export_widths"]


def test_state_is_no_part_of_the_state_dict(registry: ModeRegistry) -> None:
    model = MLP.make()
    keys = set(model.state_dict())
    apply_mode(model, ScriptedMode, registry=registry)

    assert set(model.state_dict()) == keys


def test_example_registry_is_consistent() -> None:
    example_registry().check()
