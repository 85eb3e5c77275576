# SPDX-License-Identifier: Apache-2.0
"""Products of matrices: the dimensions that are summed over meet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modewright.pruning.graph.atoms import Ids
from modewright.pruning.graph.rules.pointwise import tied_dims
from modewright.pruning.graph.tracer import Op, Rule, Tracer, Value, fixed


def contract(trace: Tracer, left: tuple[Value, Ids], right: tuple[Value, Ids], where: str) -> None:
    """Tie two dimensions that are summed over; a weight takes in what it is multiplied with."""
    trace.atoms.tie(left[1], right[1], f"it is multiplied with a fixed dimension in {where}")
    for value, dim in (left, right):
        if value.weight:
            trace.atoms.consume(dim)


def product(trace: Tracer, op: Op) -> Sequence[Value]:
    """``mm``, ``bmm``, ``mv``, ``dot`` and their ``add`` forms."""
    added = "self" in op.arguments and ("mat1" in op.arguments or "batch1" in op.arguments)
    names = [name for name in op.arguments if name not in ("beta", "alpha", "out_dtype")]
    names = names[1:] if added or ("vec" in op.arguments and len(names) > 2) else names
    a, b = trace.value(op[names[0]]), trace.value(op[names[1]])
    inner_b = b.dims[-2] if len(b.dims) > 1 else b.dims[0]
    contract(trace, (a, a.dims[-1]), (b, inner_b), str(op))
    batch: tuple[Ids, ...] = ()
    if len(a.dims) == 3:
        batch = tied_dims(trace, [a.dims[:1], b.dims[:1]], 1, str(op))
        trace.atoms.mark("experts" if b.weight or a.weight else "heads", batch[0])
    dims = (*batch, *a.dims[len(batch) : -1], *(b.dims[-1:] if len(b.dims) > 1 else ()))
    if added:
        bias = trace.value(op["self"])
        dims = tied_dims(trace, [dims, bias.dims], len(dims), str(op))
    return [Value(dims, a.weight and b.weight)]


def linear(trace: Tracer, op: Op) -> Sequence[Value]:
    """``linear``, where it is not taken apart."""
    x, w = trace.value(op["input"]), trace.value(op["weight"])
    contract(trace, (x, x.dims[-1]), (w, w.dims[1]), str(op))
    dims = (*x.dims[:-1], w.dims[0])
    if op["bias"] is not None:
        dims = tied_dims(trace, [dims, trace.value(op["bias"]).dims], len(dims), str(op))
    return [Value(dims)]


def grouped_product(trace: Tracer, op: Op) -> Sequence[Value] | None:
    """``_grouped_mm`` of rows ``[s, k]`` with one matrix of ``[experts, k, n]`` for each run."""
    names = list(op.arguments)
    x, w = trace.value(op[names[0]]), trace.value(op[names[1]])
    if len(x.dims) != 2 or len(w.dims) != 3 or op.arguments.get("bias") is not None:
        return None
    contract(trace, (x, x.dims[-1]), (w, w.dims[1]), str(op))
    trace.atoms.mark("experts", w.dims[0])
    offsets = trace.value(op["offs"]).dims[0]
    trace.atoms.tie(w.dims[0], offsets, f"its experts are numbered in {op}")
    return [Value((x.dims[0], w.dims[2]))]


def attention(trace: Tracer, op: Op) -> Sequence[Value]:
    """Fused attention on ``[batch, heads, tokens, head size]``; queries may share keys."""
    q, k, v = (trace.value(op[name]) for name in ("query", "key", "value"))
    where = str(op)
    trace.atoms.tie(q.dims[-1], k.dims[-1], f"in {where}")
    trace.atoms.tie(k.dims[-2], v.dims[-2], f"in {where}")
    for shared in (k.dims[-3], v.dims[-3]):
        repeated = np.repeat(shared, len(q.dims[-3]) // len(shared))
        trace.atoms.tie(q.dims[-3], repeated, f"its keys are fixed in {where}")
    trace.atoms.mark("heads", q.dims[-3])
    for dim in (q.dims[-1], q.dims[-2], k.dims[-2]):
        trace.atoms.freeze(dim, f"attention is scaled by it in {where}")
    mask = op.arguments.get("attn_mask", op.arguments.get("attn_bias"))
    if mask is not None and mask.ndim >= 3 and mask.shape[-3] > 1:
        trace.atoms.tie(q.dims[-3], trace.value(mask).dims[-3], f"its mask is fixed in {where}")
    found = [Value((*q.dims[:-1], v.dims[-1]))]
    rest = [Value(tuple(fixed(s) for s in t.shape)) for t in op.outputs[1:]]
    return [*found, *rest]


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv")
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "scaled_dot_product_attention",
)
RULES: dict[str, Rule] = {
    **{f"aten.{name}": product for name in _PRODUCTS},
    **{f"aten.{name}": attention for name in _ATTENTION},
    "aten.linear": linear,
    "aten._grouped_mm": grouped_product,
}
