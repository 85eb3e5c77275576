# SPDX-License-Identifier: Apache-2.0
"""Makes the checkpoints in ``tests/data/checkpoints/v1`` that every later version must restore.

They are made once for each schema version and never again: ``python tests/data/make_checkpoints.py
FOLDER`` writes a set into a new folder. Weights are computed, not drawn, so that no version of a
random number generator matters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import modewright


class SavedModel(nn.Module):
    """A tied embedding and head around a perceptron with a convolution. It may never change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.offset
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(self.fc(x)))


def make_trained() -> nn.Module:
    """The model with weights that depend on their place alone."""
    model = SavedModel().eval()
    with torch.no_grad():
        for number, tensor in enumerate([*model.parameters(), model.offset], start=1):
            count = torch.arange(tensor.numel(), dtype=torch.float64)
            tensor.copy_(torch.sin(count * 0.7 + number).mul(0.3).reshape(tensor.shape))
    return model


INPUTS = torch.arange(22).remainder(11).reshape(2, 11)
MODES = [
    ("quantize", {"scheme": "w8a8_static", "rules": [{"targets": ["fc"], "scheme": "w4a16"}]}),
    ("max_calibrate", None),
]


def main(folder: Path) -> None:
    """Write a file, a folder, and the outputs that a restored model must give."""
    model = modewright.apply_mode(
        make_trained(), MODES, mode_kwargs=[{}, {"calibration": [INPUTS]}]
    )
    modewright.save(model, folder / "quantized.safetensors")
    modewright.save(model, folder / "quantized")
    with torch.no_grad():
        save_file({"outputs": model(INPUTS)}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
