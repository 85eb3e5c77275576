# SPDX-License-Identifier: Apache-2.0
"""What networks put out, and how alike two of them put it out, for any kind of network.

A language model is measured by the text that it predicts (`language`). Of others it is known only
what the original puts out for the same input, so outputs are compared with that: logits as they
are, hidden states as their mean over all places, as embeddings of sentences are made.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from modewright.errors import DataError
from modewright.evaluation.comparison import cosine_similarity

OnWindow = Callable[[int, int], None]


def main_output(output: Any, who: str) -> tuple[torch.Tensor, bool]:
    """Return the tensor that outputs are compared by, and whether it holds logits.

    Args:
        output: What a model returned.
        who: What compares them, for the message.

    Raises:
        DataError: It holds no tensor that is known.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits, True
    first = getattr(output, "last_hidden_state", output)
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if not isinstance(first, torch.Tensor):
        raise DataError(
            f"{who} compares outputs; a {type(output).__name__} holds no tensor that it knows "
            "(`logits`, `last_hidden_state`, or the first of a tuple)."
        )
    return first, False


def reference_outputs(
    model: nn.Module, inputs: torch.Tensor, *, on_window: OnWindow | None = None
) -> torch.Tensor:
    """Record what a model puts out, to compare others with it.

    Args:
        model: Any network; run in evaluation mode, one input at a time.
        inputs: ``[n, ...]``: its first argument, of which each row is one input.
        on_window: Called after each input with how many are done, and how many there are.

    Returns:
        Float32 ``[n, features]``: logits, or whatever comes out, flattened; hidden states as their
        mean over all places.

    Raises:
        DataError: There is no input, the output holds no tensor, or outputs differ in shape.
    """
    if not len(inputs):
        raise DataError("There is no input to run the model on.")
    rows = []
    flags = [(module, module.training) for module in model.modules()]
    device = next(chain(model.parameters(), model.buffers()), inputs).device
    try:
        model.eval()
        with torch.no_grad():
            for index in range(len(inputs)):
                output = model(inputs[index : index + 1].to(device))
                rows.append(_flat(output).float().cpu())
                if on_window is not None:
                    on_window(index + 1, len(inputs))
    finally:
        for module, flag in flags:
            module.training = flag
    if len({row.shape for row in rows}) > 1:
        raise DataError("The model's outputs for the inputs differ in shape; they must be alike.")
    return torch.stack(rows)


def output_similarity(
    reference: torch.Tensor,
    model: nn.Module,
    inputs: torch.Tensor,
    *,
    on_window: OnWindow | None = None,
) -> float:
    """Return the mean cosine similarity of a model's outputs to recorded ones.

    Args:
        reference: What `reference_outputs` returned for the same inputs.
        model: The model to compare with it.
        inputs: The same inputs.
        on_window: As for `reference_outputs`.

    Raises:
        DataError: Shapes differ.
    """
    return cosine_similarity(reference, reference_outputs(model, inputs, on_window=on_window))


def _flat(output: Any) -> torch.Tensor:
    tensor, are_logits = main_output(output, "a measurement")
    if not are_logits and hasattr(output, "last_hidden_state") and tensor.ndim == 3:
        tensor = tensor.mean(1)
    return tensor.reshape(-1)
