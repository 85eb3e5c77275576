# SPDX-License-Identifier: Apache-2.0
"""The public verbs: the engine's functions with the default registry filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from modewright.builtin_modes import default_registry
from modewright.modes import apply as _apply
from modewright.modes import checkpoint as _checkpoint
from modewright.modes import contract as _contract
from modewright.modes import planning as _planning
from modewright.modes import search as _search
from modewright.modes.checkpoint import Inspection, Verification
from modewright.modes.model_like import all_modules, unwrap
from modewright.modes.planning import Plan
from modewright.modes.registry import ModeRegistry
from modewright.modes.search import SearchResult
from modewright.modes.state import ModeState, require_state_at_root, set_state, state_of
from modewright.modes.steps import ConfigLike, ModeKwargs, Modes

if TYPE_CHECKING:
    import torch

    from modewright.quantization.config import QuantizeConfig

_SEARCH_OPTIONS = (
    "calibration",
    "score_func",
    "loss_func",
    "checkpoint",
    "max_trials",
    "max_seconds",
    "on_trial",
)


def apply_mode(
    model: object,
    mode: Modes,
    *,
    registry: ModeRegistry | None = None,
    mode_kwargs: ModeKwargs = None,
    init_state: bool | None = None,
    atomic: bool = True,
) -> nn.Module:
    """Apply one mode, or several in order, and record them in the model.

    The whole sequence is checked before anything changes: names, configs, what may follow what.
    If a conversion then fails, or is interrupted, the model is put back exactly as it was.

    Args:
        model: A module (``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``
            wrappers are looked through), or the recipe of one: ``cls``, ``(cls, args)`` or
            ``(cls, args, kwargs)``.
        mode: A name, a descriptor or its class, a pair ``(mode, config)`` with a dict or config
            object, or a list of these.
        registry: Where names are looked up; the default registry if left out.
        mode_kwargs: What the modes need but must not be recorded (data, loss functions): one dict
            for all modes, or one for each.
        init_state: ``True`` demands a model to which no mode was applied yet, ``False`` one to
            which some were; left out, both are fine.
        atomic: ``False`` gives up the roll-back, and with it the memory that old tensors take
            until the last mode has finished.

    Returns:
        The converted module; for a data-parallel model the wrapper around it.

    Raises:
        UnknownModeError: A name is not registered.
        ConfigError: A config does not validate.
        IncompatibleModeError: The order of modes is not allowed.
        ApplyModeError: A conversion failed; ``mode``, ``index`` and ``cause`` say which and why.

    Example:
        >>> import torch, modewright
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> modes = [("quantize", {"scheme": "w8a16"}), "max_calibrate"]
        >>> model = modewright.apply_mode(model, modes)
        >>> modewright.last_mode(model)
        'max_calibrate'
    """
    return _apply.apply_mode(
        model,
        mode,
        registry=_or_default(registry),
        mode_kwargs=mode_kwargs,
        init_state=init_state,
        atomic=atomic,
    )


def plan(model: object, mode: Modes, *, registry: ModeRegistry | None = None) -> Plan:
    """Say what a sequence of modes would do to a model, or why it may not; change nothing.

    Args:
        model: As for :func:`apply_mode`; ``None`` checks the sequence alone.
        mode: As for :func:`apply_mode`.
        registry: Where names are looked up; the default registry if left out.

    Returns:
        A plan whose ``ok`` and ``problem`` say whether the sequence may be applied; ``print`` it.

    Example:
        >>> import modewright
        >>> print(modewright.plan(None, ["export_quantize"]).problem)
        Mode 'export_quantize' closes another mode, but none is open on this model. Apply the mode \
that it exports first.
    """
    return _planning.plan(model, mode, registry=_or_default(registry))


def mode_state(model: nn.Module) -> dict[str, Any]:
    """Return the log of the modes applied to a model, as plain data that shares nothing with it.

    Returns:
        ``{"schema_version": int, "modewright_version": str, "modes": [{"name": str, "config": dict,
        "metadata": dict}, ...], "provenance": [dict, ...]}``. Metadata may hold tensors.

    Raises:
        IncompatibleModeError: A submodule holds a log of its own.
    """
    root = _root(model)
    return (state_of(root) or ModeState()).for_saving(root).to_dict()


def restore_from_mode_state(
    model: object, state: Mapping[str, Any], *, registry: ModeRegistry | None = None
) -> nn.Module:
    """Rebuild from an unmodified model what the modes in ``state`` made of it; load no weights.

    Args:
        model: The unmodified module, or the recipe of one.
        state: What :func:`mode_state` returned.
        registry: Where modes are looked up; the default registry if left out.

    Returns:
        The model with the same modules, names, shapes and dtypes as the one the state is from.

    Raises:
        CheckpointError: The state has another form, or names an unknown mode.
        IncompatibleModeError: The model has a mode state already.
        ApplyModeError: A mode could not be restored on this model, which is as it was.
    """
    return _checkpoint.restore_from_mode_state(model, state, registry=_or_default(registry))


def save(model: nn.Module, path: str | Path) -> Path:
    """Write state and weights of a model, converted or not, in one step.

    Args:
        model: The model; tied tensors are stored once.
        path: A file name that ends in ``.safetensors``, or a folder, which holds weights in shards
            and ``mode_state.json``.

    Returns:
        The path.

    Raises:
        CheckpointError: The state dict holds something other than tensors, or the path cannot be
            written to. A checkpoint that was there is then whole.
    """
    return _checkpoint.save(model, path)


def restore(
    model: object, path: str | Path, *, registry: ModeRegistry | None = None, verify: bool = True
) -> nn.Module:
    """Turn an unmodified model into the one that was saved: modes and weights.

    Args:
        model: The unmodified module, or the recipe of one: same architecture, same dtype.
        path: What :func:`save` wrote.
        registry: Where modes are looked up; the default registry if left out.
        verify: Compare the SHA-256 of every tensor.

    Returns:
        The restored module.

    Raises:
        CheckpointError: The checkpoint is damaged, too new, of unknown modes, or does not fit the
            model, which is then as it was.
        IncompatibleModeError: The model has a mode state already.
    """
    return _checkpoint.restore(model, path, registry=_or_default(registry), verify=verify)


def verify(path: str | Path, *, registry: ModeRegistry | None = None) -> Verification:
    """Check every byte of a checkpoint: digests of all tensors and of the state, known modes.

    Raises:
        CheckpointError: Something is wrong; every damaged tensor is counted.
    """
    return _checkpoint.verify(path, registry=_or_default(registry))


def inspect(source: nn.Module | str | Path) -> Inspection:
    """Say what a checkpoint or a model holds, without running it or reading tensor data.

    Raises:
        CheckpointError: There is no checkpoint, or its manifest is damaged.
    """
    return _checkpoint.inspect(source)


def last_mode(model: nn.Module) -> str | None:
    """Return the name of the mode that was applied last, or ``None``."""
    state = state_of(_root(model))
    return state.records[-1].name if state else None


def is_converted(model: nn.Module) -> bool:
    """Whether modes were applied to the model.

    Raises:
        IncompatibleModeError: A submodule, and not the root, holds the log.
    """
    return state_of(_root(model)) is not None


def remove_mode_state(model: nn.Module) -> None:
    """Forget which modes were applied; the model itself stays as they left it."""
    root, _ = unwrap(model)
    set_state(root, None)


def check_mode(
    mode: str,
    make_model: Callable[[], nn.Module],
    run: Callable[[nn.Module], Any],
    *,
    config: ConfigLike = None,
    mode_kwargs: dict[str, Any] | None = None,
    before: Modes = None,
    before_kwargs: ModeKwargs = None,
    registry: ModeRegistry | None = None,
) -> list[str]:
    """Put a registered mode through everything that the engine promises its users about modes.

    Whoever writes a mode calls this in a test and expects an empty list.

    Args:
        mode: The mode's name.
        make_model: Builds the unmodified model, the same one at every call (seed it).
        run: Runs a model and returns a tensor, or a nest of tensors.
        config: The mode's config.
        mode_kwargs: What its ``convert`` needs besides.
        before: Modes that must come first.
        before_kwargs: What those need.
        registry: Where the modes are looked up; the default registry if left out.

    Returns:
        What is wrong, in sentences; an empty list if nothing is.
    """
    return _contract.check_mode(
        mode,
        make_model,
        run,
        registry=_or_default(registry),
        config=config,
        mode_kwargs=mode_kwargs,
        before=before,
        before_kwargs=before_kwargs,
    )


def quantize(
    model: object,
    scheme: str = "w8a8",
    *,
    calibration: object = None,
    config: QuantizeConfig | Mapping[str, Any] | None = None,
    registry: ModeRegistry | None = None,
) -> nn.Module:
    """Quantize a model and calibrate it: the modes ``quantize`` and ``max_calibrate``.

    Args:
        model: As for :func:`apply_mode`.
        scheme: Name of the scheme: ``w8a8``, ``w8a8_static``, ``w8a16``, ``w4a16`` ...
        calibration: Batches (each a tensor, tuple or dict of inputs), or a function that runs the
            model. Schemes with static activation scales need it.
        config: Further fields of the config of mode ``quantize``: rules, targets, ignore.
        registry: Where modes are looked up; the default registry if left out.

    Returns:
        The quantized model.

    Raises:
        ConfigError: The scheme is unknown or the config does not validate.
        MatchError: A pattern matches no module.
        ApplyModeError: Calibration data is needed and missing.
    """
    fields = config if isinstance(config, Mapping) or config is None else config.to_json()
    steps: Modes = [("quantize", {"scheme": scheme, **(fields or {})}), ("max_calibrate", None)]
    return apply_mode(
        model, steps, registry=registry, mode_kwargs=[{}, {"calibration": calibration}]
    )


def search(
    model: object,
    mode: Modes,
    constraints: Mapping[str, float | str],
    *,
    dummy_input: Any = None,
    calibration: object = None,
    score_func: Callable[[nn.Module], float] | None = None,
    loss_func: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    on_trial: Callable[[int, int | None], None] | None = None,
    mode_kwargs: ModeKwargs = None,
    registry: ModeRegistry | None = None,
) -> SearchResult:
    """Search what a mode opens for the best subnet within constraints, and set the model to it.

    The mode is applied first, unless it was the last that was applied. What the search chose is
    part of the mode's record when the next mode is applied or the model is saved. If anything
    fails, the model is put back as it was.

    Args:
        model: As for :func:`apply_mode`.
        mode: The mode that opens the search space: a name, or a pair of a name and a config.
        constraints: Upper bounds, absolute or relative to the whole model: ``{"params": 2e6}``,
            ``{"flops": "60%", "latency": "80%"}``, ``{"effective_bits": 4.5}``.
        dummy_input: What costs are measured with; the first calibration batch if left out.
        calibration: Batches (each a tensor, tuple or dict), or a function that runs the model.
        score_func: ``(model) -> float``, how good what is tried is; higher is better.
        loss_func: ``(model, batch) -> tensor``: for gradients, and a score without ``score_func``.
        config: Further options of the mode's searcher.
        checkpoint: A file to keep progress in; a search that was killed goes on from it.
        max_trials: Try no more than this.
        max_seconds: Begin no trial after this time.
        on_trial: Called with how much is done, and how much there is, if that is known.
        mode_kwargs: What the mode's ``convert`` needs besides.
        registry: Where the mode is looked up; the default registry if left out.

    Returns:
        A :class:`modewright.SearchResult`.

    Raises:
        SearchError: The mode has no search, or nothing meets the constraints: said before the
            search begins, with the closest that can be met.
        ConfigError: A constraint or an option is unknown.
    """
    given = [calibration, score_func, loss_func, checkpoint, max_trials, max_seconds, on_trial]
    named = zip(_SEARCH_OPTIONS, given, strict=True)
    return _search.search(
        model,
        mode,
        constraints,
        registry=_or_default(registry),
        dummy_input=dummy_input,
        config={**(config or {}), **{k: v for k, v in named if v is not None}},
        mode_kwargs=mode_kwargs,
    )


def _or_default(registry: ModeRegistry | None) -> ModeRegistry:
    return default_registry if registry is None else registry


def _root(model: nn.Module) -> nn.Module:
    root, _ = unwrap(model)
    require_state_at_root(root, all_modules(root))
    return root
