# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring: what comes back is what was saved."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modewright.api import inspect, is_converted, mode_state
from modewright.errors import CheckpointError, IncompatibleModeError
from modewright.modes import storage
from modewright.modes.apply import apply_mode
from modewright.modes.checkpoint import restore, save, verify
from modewright.modes.registry import ModeRegistry
from support.checkpoints import read_body, tensor_files
from support.example_modes import make_mode
from support.models import FAMILIES, LM, MLP, Family, Mlp, TinyLm
from support.photograph import Photograph, content, contents

KINDS = ["model.safetensors", "folder"]


@pytest.fixture(params=KINDS, ids=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("modes", [[], ["gain"], ["random_mask"], ["widths", "export_widths"]])
def test_restored_model_is_the_saved_one(
    family: Family, modes: list[str], path: Path, registry: ModeRegistry
) -> None:
    model = apply_mode(family.make(), modes, registry=registry)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)  # weights that no fresh model has
    assert save(model, path) == path
    restored = restore(family.make(), path, registry=registry)

    assert contents(restored) == contents(model)
    assert content(family.run(restored)) == content(family.run(model))
    assert is_converted(restored) is bool(modes)
    assert [m["name"] for m in mode_state(restored)["modes"]] == modes


def test_saving_changes_nothing(path: Path, registry: ModeRegistry) -> None:
    model = apply_mode(LM.make(), ["random_mask", "gain"], registry=registry)
    before = Photograph(model)
    save(model, path)

    assert before.differences(model) == []


def test_restored_model_is_saved_as_the_same_bytes(tmp_path: Path, registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), "widths", registry=registry)
    one = save(model, tmp_path / "one.safetensors")
    two = save(restore(MLP.make(), one, registry=registry), tmp_path / "two.safetensors")

    bodies = [read_body(p) for p in (one, two)]
    assert bodies[0]["tensors"] == bodies[1]["tensors"]
    assert bodies[0]["state"] == bodies[1]["state"]


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_afterwards_if_it_was_before(
    tmp_path: Path, registry: ModeRegistry, collecting: bool
) -> None:
    file = save(apply_mode(MLP.make(), "widths", registry=registry), tmp_path / "m.safetensors")
    was = gc.isenabled()
    try:
        gc.enable() if collecting else gc.disable()
        with pytest.raises(CheckpointError):
            restore(LM.make(), file, registry=registry)
        restore(MLP.make(), file, registry=registry)
        assert gc.isenabled() is collecting
    finally:
        gc.enable() if was else gc.disable()


LIKES: dict[str, Callable[[], Any]] = {
    "class": lambda: Mlp,
    "class and arguments": lambda: (Mlp, (8, 12)),
    "wrapper": lambda: nn.DataParallel(MLP.make()),
}


@pytest.mark.parametrize("make_like", LIKES.values(), ids=LIKES)
def test_checkpoint_can_be_restored_on_recipes_and_wrappers(
    make_like: Callable[[], Any], path: Path, registry: ModeRegistry
) -> None:
    like = make_like()
    model = apply_mode(nn.DataParallel(MLP.make()), "gain", registry=registry)
    save(model, path)
    restored = restore(like, path, registry=registry)

    assert type(restored) is (nn.DataParallel if isinstance(like, nn.Module) else Mlp)
    inner = getattr(restored, "module", restored)
    assert contents(inner) == contents(model.module)


def test_checkpoint_can_be_restored_on_the_meta_device(path: Path, registry: ModeRegistry) -> None:
    model = apply_mode(LM.make(), "scripted", registry=registry)
    save(model, path)
    with torch.device("meta"):
        empty = TinyLm()
    restored = restore(empty, path, registry=registry)

    assert contents(restored) == contents(model)
    assert restored.head.weight is restored.embed.weight


def test_flags_of_parameters_stay_those_of_the_model(path: Path, registry: ModeRegistry) -> None:
    save(MLP.make(), path)
    model = MLP.make()
    model.head.weight.requires_grad_(False)
    restored = restore(model, path, registry=registry)

    assert not restored.head.weight.requires_grad
    assert restored.head.bias.requires_grad


def test_converted_model_cannot_be_restored_onto(path: Path, registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), "gain", registry=registry)
    save(model, path)

    with pytest.raises(IncompatibleModeError, match="needs the unmodified model"):
        restore(model, path, registry=registry)


def test_digests_can_be_left_unchecked(path: Path, registry: ModeRegistry) -> None:
    model = MLP.make()
    save(model, path)

    assert contents(restore(MLP.make(), path, registry=registry, verify=False)) == contents(model)


# --- tied and overlapping tensors ----------------------------------------------------------------


def test_tied_tensors_are_stored_once_and_tied_when_restored(
    path: Path, registry: ModeRegistry
) -> None:
    model = LM.make()
    save(model, path)
    body = read_body(path)
    restored = restore(LM.make(), path, registry=registry)

    assert body["aliases"] == {"head.weight": "embed.weight"}
    assert "head.weight" not in body["tensors"]
    assert restored.head.weight is restored.embed.weight
    assert len(list(restored.parameters())) == len(list(model.parameters()))


def test_tied_buffers_are_tied_when_restored(path: Path, registry: ModeRegistry) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Identity(), nn.Identity())
        shared = torch.zeros(3)
        for child in model:
            child.register_buffer("shared", shared)
        return model

    model = make()
    model[0].shared.fill_(4)
    save(model, path)
    restored = restore(make(), path, registry=registry)

    assert restored[0].shared is restored[1].shared
    assert restored[1].shared.tolist() == [4, 4, 4]


def test_weights_untied_since_come_back_untied_with_their_own_values(
    path: Path, registry: ModeRegistry
) -> None:
    model = LM.make()
    model.head.weight = nn.Parameter(model.embed.weight.detach() * 2)
    save(model, path)
    restored = restore(LM.make(), path, registry=registry)

    assert contents(restored) == contents(model)
    assert restored.head.weight is not restored.embed.weight


def test_weights_tied_since_come_back_with_their_values(path: Path, registry: ModeRegistry) -> None:
    def make() -> TinyLm:
        model = TinyLm()
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
        return model

    save(LM.make(), path)
    restored = restore(make(), path, registry=registry)

    assert contents(restored) == contents(LM.make())
    with torch.no_grad():
        restored.head.weight.zero_()
    assert restored.embed.weight.abs().sum() > 0


def test_overlapping_views_come_back_with_their_values(path: Path, registry: ModeRegistry) -> None:
    def make() -> nn.Module:
        model = nn.Identity()
        base = torch.arange(12.0)
        model.register_buffer("whole", base)
        model.register_buffer("left", base[:8])
        model.register_buffer("right", base[4:])
        model.register_buffer("square", base.view(3, 4))
        model.register_buffer("transposed", base.view(3, 4).t())
        model.register_buffer("strided", base[::2])
        model.register_buffer("expanded", base[:1].expand(5))
        model.register_buffer("empty", base[:0])
        model.register_buffer("another_empty", base[:0])
        return model

    model = make()
    save(model, path)
    blank = make()
    blank.whole.zero_()

    assert contents(restore(blank, path, registry=registry)) == contents(model)


# --- kinds of tensors ----------------------------------------------------------------------------

TENSORS = {
    "float32": torch.tensor([1.5, -0.0, torch.nan, torch.inf]),
    "float64": torch.tensor([1e-300], dtype=torch.float64),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "float16": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "fp8_e4m3": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    "fp8_e5m2": torch.tensor([1.5, -2.0]).to(torch.float8_e5m2),
    "bool": torch.tensor([True, False]),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "int64": torch.tensor([2**62, -1]),
    "uint16": torch.tensor([0, 65535], dtype=torch.uint16),
    "complex64": torch.tensor([1 + 2j, -3j], dtype=torch.complex64),
    "conjugated": torch.tensor([1 + 2j, -3j], dtype=torch.complex64).conj(),
    "negated view": torch.tensor([1 + 2j, -3j], dtype=torch.complex64).conj().imag,
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "channels last": torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_every_kind_of_tensor_comes_back_bit_for_bit(
    tensor: torch.Tensor, path: Path, registry: ModeRegistry
) -> None:
    def convert(self: object, model: nn.Module, config: Any) -> Any:
        return model, {"kept": [tensor]}

    registry.register(make_mode("keeps", convert=convert))
    model = apply_mode(nn.Identity(), "keeps", registry=registry)
    model.register_buffer("buffer", tensor)
    save(model, path)
    fresh = nn.Identity()
    fresh.register_buffer("buffer", torch.empty_like(tensor))
    restored = restore(fresh, path, registry=registry)

    assert content(restored.buffer) == content(tensor.resolve_neg())
    kept = mode_state(restored)["modes"][0]["metadata"]["kept"][0]
    assert content(kept) == content(tensor.resolve_neg())
    assert verify(path, registry=registry).tensors == 2


class ExtraState(nn.Module):
    def get_extra_state(self) -> Any:
        return {"any": object}

    def set_extra_state(self, state: Any) -> None:
        pass


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = nn.Identity()
    model.register_buffer("buffer", tensor)
    return model


UNSAVABLE = {
    "extra state": (ExtraState(), "_extra_state.*refuses"),
    "meta": (nn.Linear(2, 2, device="meta"), "meta device"),
    "sparse": (with_buffer(torch.eye(2).to_sparse()), "only dense"),
    "complex128": (with_buffer(torch.zeros(1, dtype=torch.complex128)), "complex128"),
}


@pytest.mark.parametrize(("model", "text"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_cannot_be_saved_is_refused_and_the_old_checkpoint_kept(
    model: nn.Module, text: str, path: Path, registry: ModeRegistry
) -> None:
    save(MLP.make(), path)

    with pytest.raises(CheckpointError, match=text):
        save(model, path)
    assert contents(restore(MLP.make(), path, registry=registry)) == contents(MLP.make())


def test_metadata_that_cannot_be_saved_is_refused(path: Path, registry: ModeRegistry) -> None:
    mode = make_mode(
        "m", convert=lambda self, m, c: (m, {"z": torch.zeros(1, dtype=torch.complex128)})
    )
    model = apply_mode(MLP.make(), mode, registry=registry)

    with pytest.raises(CheckpointError, match="complex128"):
        save(model, path)


# --- writing over what is there ------------------------------------------------------------------


def test_file_is_replaced(tmp_path: Path, registry: ModeRegistry) -> None:
    path = tmp_path / "m.safetensors"
    save(MLP.make(), path)
    save(LM.make(), path)

    assert contents(restore(LM.make(), path, registry=registry)) == contents(LM.make())
    assert files_in(tmp_path) == ["m.safetensors"]


def test_shards_of_a_replaced_folder_are_removed_and_other_files_kept(
    tmp_path: Path, registry: ModeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    monkeypatch.setattr(storage, "MAX_SHARD_BYTES", 300)
    save(apply_mode(MLP.make(), "random_mask", registry=registry), path)
    (path / "config.json").write_text("{}")
    (path / "model-of-someone-else.safetensors").write_bytes(b"x")
    many = files_in(path)
    monkeypatch.undo()
    save(LM.make(), path)

    assert len(many) > 6
    assert len(files_in(path)) == 5
    assert {"config.json", "model-of-someone-else.safetensors"} < set(files_in(path))
    assert contents(restore(LM.make(), path, registry=registry)) == contents(LM.make())


def test_saving_the_same_model_again_keeps_the_folder(
    tmp_path: Path, registry: ModeRegistry
) -> None:
    path = save(MLP.make(), tmp_path / "folder")
    before = files_in(path)
    save(MLP.make(), path)

    assert files_in(path) == before
    verify(path, registry=registry)


@pytest.mark.parametrize("limit", [1, 100, 300, 10_000], ids="{} bytes".format)
def test_shards_keep_to_their_bound_and_hold_everything(
    limit: int, tmp_path: Path, registry: ModeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_SHARD_BYTES", limit)
    model = LM.make()
    path = save(model, tmp_path / "folder")
    shards: dict[str, list[int]] = {}
    for name, entry in read_body(path)["tensors"].items():
        shards.setdefault(entry["file"], []).append(model.state_dict()[name].nbytes)

    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in shards.values())
    assert len(shards) == len(tensor_files(path))
    assert contents(restore(LM.make(), path, registry=registry)) == contents(model)


def test_folder_of_a_plain_model_has_the_index_that_other_programs_read(
    tmp_path: Path, registry: ModeRegistry
) -> None:
    path = save(MLP.make(), tmp_path / "folder")
    index = json.loads((path / storage.INDEX_NAME).read_text())

    assert set(index["weight_map"]) == set(MLP.make().state_dict())
    assert all((path / file).is_file() for file in index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in MLP.make().state_dict().values()
    )


def test_folder_of_an_open_search_space_offers_no_index(
    tmp_path: Path, registry: ModeRegistry
) -> None:
    path = save(MLP.make(), tmp_path / "folder")
    save(apply_mode(MLP.make(), "widths", registry=registry), path)

    assert not (path / storage.INDEX_NAME).exists()
    assert not list(path.glob("model*.safetensors"))
    save(apply_mode(MLP.make(), ["widths", "export_widths"], registry=registry), path)
    assert (path / storage.INDEX_NAME).exists()


def test_missing_folders_are_made(tmp_path: Path, registry: ModeRegistry) -> None:
    for name in ("a/b/m.safetensors", "c/d/folder"):
        assert verify(save(MLP.make(), tmp_path / name), registry=registry).tensors == 12


def test_path_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "x.safetensors").mkdir()
    for path in (
        tmp_path / "file" / "m.safetensors",
        tmp_path / "file",
        tmp_path / "x.safetensors",
        tmp_path / ("n" * 300 + ".safetensors"),
    ):
        with pytest.raises(CheckpointError, match=r"(cannot|could not) be written"):
            save(MLP.make(), path)
    assert files_in(tmp_path) == ["file", "x.safetensors"]


# --- verify and inspect --------------------------------------------------------------------------


def test_verify_counts_what_it_checked(path: Path, registry: ModeRegistry) -> None:
    model = apply_mode(MLP.make(), ["random_mask", "gain"], registry=registry)
    save(model, path)
    result = verify(path, registry=registry)

    masks = 5
    assert result.modes == ("random_mask", "gain")
    assert result.tensors == len(model.state_dict()) + masks
    assert result.bytes > sum(t.nbytes for t in model.state_dict().values())


def test_inspection_of_a_checkpoint_and_its_model_agree(path: Path, registry: ModeRegistry) -> None:
    model = apply_mode(LM.make(), "random_mask", registry=registry)
    save(model, path)
    of_path, of_model = inspect(path), inspect(model)

    assert of_path.source == str(path)
    assert of_model.source == "TinyLm"
    assert of_path.bytes_by_dtype == of_model.bytes_by_dtype
    assert (of_path.tensors, of_path.bytes) == (of_model.tensors, of_model.bytes)
    assert of_path.modes == of_model.modes
    assert of_path.tied == {"head.weight": "embed.weight"}
    assert of_path.modes[0]["name"] == "random_mask"
    assert set(of_path.bytes_by_dtype) == {"float32", "bool"}
