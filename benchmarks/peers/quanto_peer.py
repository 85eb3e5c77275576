# SPDX-License-Identifier: Apache-2.0
"""optimum-quanto: rounding to nearest.

Algorithm: ``rtn``. With four bits and less the tool chooses the group size itself; whatever a
scheme says of groups is not heard.
"""

from __future__ import annotations

import measure
import torch
from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8, quantize

TYPES = {2: qint2, 4: qint4, 8: qint8}


def optimize(task: measure.Task, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with weights in few bits."""
    weights = qfloat8 if task.scheme.integer is None else TYPES[task.scheme.bits]
    quantize(model, weights=weights, include=measure.linears(model, task.minilm))
    freeze(model)
    return model


if __name__ == "__main__":
    measure.run("optimum-quanto", optimize)
