# SPDX-License-Identifier: Apache-2.0
"""Mode ``rotate``: turn the residual stream by a rotation that all weights absorb.

Every module that writes to the stream writes it rotated, and every one that reads it turns it back;
gains of norms go into the readers first, since only a norm without a gain commutes with a rotation.
The network computes what it did, at the same cost, but no channel of the stream stands out any
more, neither in activations nor in weights (Ashkboos et al. 2024, *QuaRot*; Liu et al. 2024,
*SpinQuant*, whose R1 this is).

A head that shares the embedding's weight gets a weight of its own: the gain of the last norm is in
one of them only. The network is run before and after; if it computes something else, nothing is
changed and an error says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from modewright.calibration.calls import first_tensor
from modewright.calibration.forward import OnBatch, evaluating, run_batch
from modewright.errors import DataError
from modewright.quantization.algorithms.hadamard import random_orthogonal, randomized_hadamard
from modewright.quantization.config import RotateConfig
from modewright.quantization.residual import ResidualStream, find_stream

Metadata = dict[str, Any]
_ROWS = 8192  # rows of a weight that are rotated at a time, in float64
_TIED = "tie_word_embeddings"


def convert(
    model: nn.Module,
    config: RotateConfig,
    *,
    calibration: object = None,
    on_batch: OnBatch | None = None,
) -> tuple[nn.Module, Metadata]:
    """Rotate the stream. Weights are replaced; nothing is written into those that are there.

    Raises:
        DataError: There is no data to run the network on, its residual stream cannot be found, or
            it does not compute the same when that is rotated.
    """
    run = _runner(model, calibration)
    with torch.no_grad(), evaluating(model):
        expected = run()
        stream = find_stream(model, run)
        before = [(module, dict(module._parameters)) for module in model.modules()]
        settings = getattr(model, "config", None)
        untied = _untie(model, _tied(stream))
        generator = torch.Generator().manual_seed(config.seed)
        make = randomized_hadamard if config.rotation == "hadamard" else random_orthogonal
        _rotate(stream, make(stream.width, generator))
        error = float((run() - expected).norm() / expected.norm().clamp_min(1e-30))
        limit = torch.finfo(expected.dtype).eps ** 0.5
        if not error <= limit:
            for module, parameters in before:
                module._parameters.update(parameters)
            if settings is not None:
                model.config = settings
            raise DataError(
                f"rotating the residual stream changed the output by {error:.2g} of its size "
                f"(at most {limit:.2g} was expected), so it was not done: something writes to the "
                f"stream of {type(model).__name__}, or reads from it, that is no plain linear "
                "layer behind an RMS norm. Mode 'hadamard' after 'quantize' rotates layer by layer."
            )
    if on_batch is not None:
        on_batch(1, 1)
    return model, {
        "width": stream.width,
        "norms": [norm.path for norm in stream.norms],
        "readers": [path for norm in stream.norms for path in norm.readers],
        "writers": [*stream.embeddings, *stream.writers],
        "untied": untied,
        "error": error,
    }


def restore(model: nn.Module, metadata: Metadata) -> nn.Module:
    """Untie what was untied; the weights themselves are loaded."""
    _untie(model, list(metadata["untied"]))
    return model


def _rotate(stream: ResidualStream, rotation: torch.Tensor) -> None:
    """Rotate everything that touches the stream. Vectors are rows: ``x`` becomes ``x @ R``."""
    for norm in stream.norms:
        for reader in norm.readers.values():
            _replace(reader, "weight", _times(reader.weight, rotation, norm.gain))
        gain = norm.module._parameters["weight"]
        if gain is not None:
            _replace(norm.module, "weight", torch.full_like(gain, norm.neutral))
    for embedding in stream.embeddings.values():
        _replace(embedding, "weight", _times(embedding.weight, rotation))
    for writer in stream.writers.values():
        _replace(writer, "weight", _times(writer.weight.t(), rotation).t().contiguous())
        if writer.bias is not None:
            _replace(writer, "bias", _times(writer.bias.unsqueeze(0), rotation)[0])


def _times(
    rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``(rows * gain) @ rotation``, computed in float64, in the dtype of the rows."""
    turn = rotation.to(rows.device)
    if gain is not None:
        turn = gain.to(rows.device).unsqueeze(1) * turn
    parts = [(part.double() @ turn).to(rows.dtype) for part in torch.split(rows.detach(), _ROWS)]
    return torch.cat(parts)


def _tied(stream: ResidualStream) -> list[str]:
    """Return the paths of readers whose weight is an embedding's too."""
    shared = {id(embedding.weight) for embedding in stream.embeddings.values()}
    readers = {path: layer for norm in stream.norms for path, layer in norm.readers.items()}
    return [path for path, layer in readers.items() if id(layer.weight) in shared]


def _untie(model: nn.Module, paths: list[str]) -> list[str]:
    """Give layers weights of their own, and let a Transformers config say so."""
    for path in paths:
        layer = model.get_submodule(path)
        weight = layer._parameters["weight"]
        if weight is not None:
            _replace(layer, "weight", weight.detach().clone())
    settings: Any = getattr(model, "config", None)
    if paths and getattr(settings, _TIED, False):
        settings = copy.deepcopy(settings)
        setattr(settings, _TIED, False)
        model.config = settings
    return paths


def _runner(model: nn.Module, calibration: object) -> Callable[[], torch.Tensor]:
    """Return a function that runs the network, always on the same input; it returns the output."""
    if calibration is None or not (callable(calibration) or isinstance(calibration, Iterable)):
        raise DataError(
            "mode 'rotate' runs the network on one batch before and after, to see that it computes "
            "the same: pass mode_kwargs={'calibration': batches}."
        )
    batch = None if callable(calibration) else next(iter(calibration), None)
    if batch is None and not callable(calibration):
        raise DataError("mode 'rotate' needs one batch of calibration data, but there is none.")

    def run() -> torch.Tensor:
        if not callable(calibration):
            return _tensor(run_batch(model, batch))
        outputs: list[Any] = []
        handle = model.register_forward_hook(lambda *given: outputs.append(given[-1]))
        try:
            calibration(model)
        finally:
            handle.remove()
        if not outputs:
            raise DataError("the calibration function did not run the model.")
        return _tensor(outputs[0])

    return run


def _tensor(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    found = logits if isinstance(logits, torch.Tensor) else first_tensor(output)
    if found is None or not found.is_floating_point():
        raise DataError(f"a {type(output).__name__} holds no float tensor to compare outputs by.")
    return found


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    own = module._parameters[name]
    trains = own is not None and own.requires_grad
    module._parameters[name] = nn.Parameter(value, requires_grad=trains)
