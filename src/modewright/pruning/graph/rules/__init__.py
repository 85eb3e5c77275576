# SPDX-License-Identifier: Apache-2.0
"""What each ATen operation does to dimensions; one file for each kind of operation.

To teach the tracer an operation, write a function that takes the tracer and the
:class:`~modewright.pruning.graph.tracer.Op` and returns a
:class:`~modewright.pruning.graph.tracer.Value` for each output tensor (``None``: freeze what goes
in), and put it into the table of the file that it belongs to.
"""

from modewright.pruning.graph.rules import (
    contraction,
    indexing,
    pointwise,
    reduction,
    shape,
    spatial,
)
from modewright.pruning.graph.rules.pointwise import broadcast
from modewright.pruning.graph.tracer import Rule

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **shape.RULES,
    **contraction.RULES,
    **reduction.RULES,
    **indexing.RULES,
    **spatial.RULES,
}

__all__ = ["RULES", "broadcast"]
