# SPDX-License-Identifier: Apache-2.0
"""The log of modes: reading it, restoring from it, forgetting it, migrating it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from modewright.api import (
    is_converted,
    last_mode,
    mode_state,
    remove_mode_state,
    restore_from_mode_state,
)
from modewright.errors import ApplyModeError, CheckpointError, IncompatibleModeError
from modewright.modes.apply import apply_mode
from modewright.modes.codec import split_tensors
from modewright.modes.manifest import migrate
from modewright.modes.registry import ModeRegistry
from support.example_modes import RandomMaskMode, example_registry, make_mode
from support.models import MLP, Mlp
from support.photograph import Photograph, contents


def masked(registry: ModeRegistry) -> nn.Module:
    return apply_mode(MLP.make(), ["random_mask", "gain"], registry=registry)


def plain(state: Any) -> tuple[Any, dict[str, list[Any]]]:
    data, tensors = split_tensors(state, "state")
    return data, {name: tensor.tolist() for name, tensor in tensors.items()}


# --- reading -------------------------------------------------------------------------------------


def test_model_without_modes_has_an_empty_state() -> None:
    assert mode_state(MLP.make())["modes"] == []
    assert last_mode(MLP.make()) is None
    assert not is_converted(MLP.make())


def test_reading_twice_gives_the_same_and_changes_nothing(registry: ModeRegistry) -> None:
    model = masked(registry)
    before = Photograph(model)

    assert plain(mode_state(model)) == plain(mode_state(model))
    assert before.differences(model) == []


def test_what_is_read_shares_nothing_with_the_model(registry: ModeRegistry) -> None:
    model = masked(registry)
    expected = plain(mode_state(model))
    state = mode_state(model)
    state["modes"][0]["metadata"]["masks"]["head"].zero_()
    state["modes"][1]["config"]["factor"] = 9.0
    state["modes"][1]["metadata"]["layers"].clear()
    state["provenance"][0]["seed"] = -1
    state["modes"].pop(0)

    assert plain(mode_state(model)) == expected


def test_update_for_save_edits_only_the_copy_that_is_read() -> None:
    calls: list[int] = []

    def hook(self: object, model: nn.Module, config: Any, metadata: dict[str, Any]) -> None:
        metadata["count"] = metadata.get("count", 0) + 1
        calls.append(metadata["count"])

    model = apply_mode(MLP.make(), make_mode("m", update_for_save=hook), registry=ModeRegistry())

    assert [mode_state(model)["modes"][0]["metadata"] for _ in range(3)] == [{"count": 1}] * 3
    assert calls == [1, 1, 1]


def test_update_for_save_is_asked_of_the_last_mode_only(registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), ["gain", "scripted"], registry=registry)

    assert "saved" not in mode_state(model)["modes"][0]["metadata"]
    assert mode_state(apply_mode(MLP.make(), "gain", registry=registry))["modes"][0]["metadata"][
        "saved"
    ]


def test_mode_that_is_not_saved_is_applied_but_left_out_of_the_state(
    registry: ModeRegistry,
) -> None:
    transient = make_mode("transient", save_mode_in_state=False)
    model = apply_mode(MLP.make(), ["scripted", transient], registry=registry)

    assert [mode["name"] for mode in mode_state(model)["modes"]] == ["scripted"]
    assert last_mode(model) == "transient"
    apply_mode(model, "gain", registry=registry)
    assert [mode["name"] for mode in mode_state(model)["modes"]] == ["scripted", "gain"]


def test_forgetting_the_state_leaves_the_model_alone(registry: ModeRegistry) -> None:
    model = masked(registry)
    weights = contents(model)
    remove_mode_state(model)

    assert not is_converted(model)
    assert contents(model) == weights
    remove_mode_state(model)


# --- restoring -----------------------------------------------------------------------------------


def test_restored_model_has_the_structure_and_the_state(registry: ModeRegistry) -> None:
    model = masked(registry)
    restored = restore_from_mode_state(MLP.make(), mode_state(model), registry=registry)

    assert [type(m).__name__ for m in restored.modules()] == [
        type(m).__name__ for m in model.modules()
    ]
    assert list(restored.state_dict()) == list(model.state_dict())
    assert restored.head.mask.equal(model.head.mask)
    assert plain(mode_state(restored)) == plain(mode_state(model))


def test_restoring_draws_no_random_numbers_from_the_user(registry: ModeRegistry) -> None:
    def rebuild(self: object, model: nn.Module, config: Any, metadata: Any) -> nn.Module:
        model.head = nn.Linear(8, 4)
        return model

    registry.register(make_mode("rebuilds", restore=rebuild))
    state = mode_state(apply_mode(MLP.make(), "rebuilds", registry=registry))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    restore_from_mode_state(MLP.make(), state, registry=registry)

    assert torch.rand(3).equal(expected)


def test_state_given_to_restore_is_not_kept(registry: ModeRegistry) -> None:
    state = mode_state(masked(registry))
    restored = restore_from_mode_state(MLP.make(), state, registry=registry)
    expected = plain(mode_state(restored))
    state["modes"][0]["metadata"]["masks"]["head"].zero_()

    assert plain(mode_state(restored)) == expected
    assert restored.head.mask.any()


def test_state_of_an_unconverted_model_restores_to_an_unconverted_one(
    registry: ModeRegistry,
) -> None:
    restored = restore_from_mode_state(MLP.make(), mode_state(MLP.make()), registry=registry)

    assert not is_converted(restored)


@pytest.mark.parametrize("like", [Mlp, (Mlp, (8,)), (Mlp, (), {"features": 8})], ids=str)
def test_state_can_be_restored_on_the_recipe_of_a_model(like: Any, registry: ModeRegistry) -> None:
    restored = restore_from_mode_state(like, mode_state(masked(registry)), registry=registry)

    assert last_mode(restored) == "gain"


def test_wrapper_is_looked_through_and_returned(registry: ModeRegistry) -> None:
    wrapper = nn.DataParallel(MLP.make())

    assert restore_from_mode_state(wrapper, mode_state(masked(registry)), registry=registry) is (
        wrapper
    )
    assert last_mode(wrapper) == "gain"


def test_converted_model_cannot_be_restored_onto(registry: ModeRegistry) -> None:
    model = masked(registry)
    before = Photograph(model)

    with pytest.raises(IncompatibleModeError, match="needs the unmodified model"):
        restore_from_mode_state(model, mode_state(model), registry=registry)
    assert before.differences(model) == []


def test_failure_while_restoring_leaves_the_model_as_it_was(registry: ModeRegistry) -> None:
    def fail(self: object, model: nn.Module, config: Any, metadata: Any) -> nn.Module:
        model.head.weight.data.zero_()
        raise KeyError("scales")

    registry.register(make_mode("broken", restore=fail))
    state = mode_state(apply_mode(MLP.make(), ["random_mask", "broken"], registry=registry))
    fresh = MLP.make()
    before = Photograph(fresh)

    with pytest.raises(ApplyModeError, match=r"'broken' \(step 2 of 2\) could not be restored"):
        restore_from_mode_state(fresh, state, registry=registry)
    assert before.differences(fresh) == []


@pytest.mark.parametrize("result", [None, 3], ids=repr)
def test_restore_that_returns_no_model_failed(result: object, registry: ModeRegistry) -> None:
    registry.register(make_mode("broken", restore=lambda self, model, config, metadata: result))
    state = mode_state(apply_mode(MLP.make(), "broken", registry=registry))

    with pytest.raises(ApplyModeError, match=r"restore (returned None|must return)"):
        restore_from_mode_state(MLP.make(), state, registry=registry)


def test_mode_that_needs_the_recipe_cannot_be_restored_on_a_module(
    registry: ModeRegistry,
) -> None:
    registry.register(
        make_mode(
            "wants_recipe",
            require_model_like=True,
            convert=lambda self, recipe, config: (recipe.build(), {}),
            restore=lambda self, recipe, config, metadata: recipe.build(),
        )
    )
    state = mode_state(apply_mode(Mlp, "wants_recipe", registry=registry))

    assert last_mode(restore_from_mode_state(Mlp, state, registry=registry)) == "wants_recipe"
    with pytest.raises(IncompatibleModeError, match="needs the recipe"):
        restore_from_mode_state(MLP.make(), state, registry=registry)


def test_impossible_order_of_records_is_refused(registry: ModeRegistry) -> None:
    state = mode_state(apply_mode(MLP.make(), ["widths", "export_widths"], registry=registry))
    state["modes"].reverse()

    with pytest.raises(IncompatibleModeError, match="none is open"):
        restore_from_mode_state(MLP.make(), state, registry=registry)


def test_record_of_an_unregistered_mode_names_who_recorded_it(registry: ModeRegistry) -> None:
    state = mode_state(masked(registry))
    registry.remove(RandomMaskMode.name)

    with pytest.raises(CheckpointError, match=r"support\.example_modes\.RandomMaskMode"):
        restore_from_mode_state(MLP.make(), state, registry=registry)


def record(**changes: Any) -> dict[str, Any]:
    entry = {"name": "scripted", "config": {}, "metadata": {}, **changes}
    return {"schema_version": 1, "modes": [entry]}


BAD_STATES: dict[str, Any] = {
    "none": None,
    "list": [],
    "no modes": {"schema_version": 1},
    "modes no list": {"schema_version": 1, "modes": {"a": 1}},
    "record no dict": {"schema_version": 1, "modes": [3]},
    "record without config": {"schema_version": 1, "modes": [{"name": "scripted"}]},
    "name no text": record(name=3),
    "unknown name": record(name="nope"),
    "config no dict": record(config=[]),
    "unknown key in config": record(config={"x": 1}),
    "metadata no dict": record(metadata=None),
    "object in metadata": record(metadata={"a": object()}),
    "future schema": {"schema_version": 99, "modes": []},
    "schema no number": {"schema_version": "1", "modes": []},
    "schema true": {"schema_version": True, "modes": []},
    "schema zero": {"schema_version": 0, "modes": []},
}


@pytest.mark.parametrize("state", BAD_STATES.values(), ids=BAD_STATES)
def test_other_data_is_a_checkpoint_error_and_the_model_untouched(
    state: Any, registry: ModeRegistry
) -> None:
    model = MLP.make()
    before = Photograph(model)

    with pytest.raises(CheckpointError):
        restore_from_mode_state(model, state, registry=registry)
    assert before.differences(model) == []


def test_provenance_of_another_form_decides_nothing(registry: ModeRegistry) -> None:
    for origin in (None, [3], [{"seed": "x", "owner": 3, "unknown": 1}], {"a": 1}):
        state = {**record(), "provenance": origin}
        assert last_mode(restore_from_mode_state(MLP.make(), state, registry=registry))


# --- migrations ----------------------------------------------------------------------------------


def rename(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "names": [*body.get("names", []), "v2"]}


def test_old_data_passes_through_every_migration_in_order() -> None:
    steps = {1: rename, 2: lambda body: {**body, "names": [*body["names"], "v3"]}}
    migrated = migrate({"schema_version": 1}, "It", migrations=steps, current=3)

    assert migrated == {"schema_version": 3, "names": ["v2", "v3"]}


def test_current_data_is_not_migrated() -> None:
    body = {"schema_version": 3}

    assert migrate(body, "It", migrations={1: rename}, current=3) is body


def test_missing_migration_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no migration leads on from schema version 2"):
        migrate({"schema_version": 1}, "It", migrations={1: rename}, current=3)


def test_newer_data_names_the_version_that_wrote_it() -> None:
    with pytest.raises(CheckpointError, match=r"written by modewright 7\.1.*Upgrade"):
        migrate({"schema_version": 2, "modewright_version": "7.1"}, "It", current=1)


def test_migration_that_fails_on_damaged_data_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="could not be migrated"):
        migrate({"schema_version": 1}, "It", migrations={1: lambda body: body["gone"]}, current=2)


def test_example_modes_restore_by_name_alone() -> None:
    state = mode_state(masked(example_registry()))

    assert last_mode(restore_from_mode_state(Mlp, state, registry=example_registry())) == "gain"
