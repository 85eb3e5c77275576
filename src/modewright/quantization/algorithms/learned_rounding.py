# SPDX-License-Identifier: Apache-2.0
r"""Learned rounding: move weights across rounding boundaries, and clip them, by gradient descent.

For every weight an offset in ``[-1/2, 1/2]`` steps is added before rounding, and for every group
the scale is multiplied with a factor and the zero point shifted; all of them are learned on what a
whole block puts out (Cheng et al. 2023, *SignRound*; Li et al. 2021, *BRECQ*, for the
reconstruction of blocks).
Rounding passes gradients straight through.

Codes that another algorithm has chosen can be the start: an offset then moves the value next to
its code's side of the boundary, so that the first forward pass gives exactly those codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from modewright.formats.affine import quantize
from modewright.formats.catalogue import NumberFormat, round_to_
from modewright.formats.floating import FloatFormat, TableFormat
from modewright.formats.integer import IntegerFormat
from modewright.formats.scaling import ScaleFormat, round_scale

Optimizer = Literal["sign", "adam"]

_EDGE = 0.45  # how far from its code, in steps, a value may start that is to round to it
_LEAST, _MOST = 0.3, 1.1  # range of the factors on scales
_SLAB = 1 << 16  # values at a time: few enough for a processor's cache


class _Rounded(torch.autograd.Function):
    """What remains of a weight; see :meth:`LearnedWeight.values`.

    With ``place = w / scale``, ``code = round(place + offset * step) + zero_point`` and ``inside``
    where that lies in the format's range, the value is ``(code - zero_point) * scale``. Rounding
    passes gradients straight through, so the derivatives are

    * ``inside * step * scale`` by the offset,
    * ``code - zero_point - inside * place`` by the scale (that of Esser et al. 2019, LSQ),
    * ``(inside - 1) * scale`` by the zero point.

    Rows are computed some at a time, few enough for a processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grouped: torch.Tensor,
        offset: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        fmt: NumberFormat,
    ) -> torch.Tensor:
        codes, result = torch.empty_like(grouped), torch.empty_like(grouped)
        inside = torch.empty_like(grouped, dtype=torch.bool)
        for rows in slabs(grouped):
            point = None if zero_point is None else zero_point[rows].unsqueeze(-1)
            width = scale[rows].unsqueeze(-1)
            part = grouped[rows] / width
            part += offset[rows] * local_step(part, fmt)
            if point is not None:
                part.round_().add_(point)
            margin = 0.5 if isinstance(fmt, IntegerFormat) else 0.0
            torch.ge(part, fmt.min_value - margin, out=inside[rows])
            inside[rows] &= part <= fmt.max_value + margin
            part = round_to_(part, fmt)
            codes[rows] = part if point is None else part.sub_(point)
            torch.mul(codes[rows], width, out=result[rows])
        ctx.save_for_backward(grouped, codes, inside, scale)
        ctx.fmt, ctx.has_zero_point = fmt, zero_point is not None
        return result

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[None, torch.Tensor, torch.Tensor, torch.Tensor | None, None]:
        grouped, codes, inside, scale = ctx.saved_tensors
        by_offset, by_scale = torch.empty_like(grouped), torch.empty_like(scale)
        by_point = torch.empty_like(scale) if ctx.has_zero_point else None
        for rows in slabs(grouped):
            width = scale[rows].unsqueeze(-1)
            place = grouped[rows] / width
            within = torch.mul(gradient[rows], inside[rows], out=by_offset[rows])
            by_scale[rows] = (gradient[rows] * codes[rows]).sub_(within * place).sum(-1)
            if by_point is not None:
                by_point[rows] = (within - gradient[rows]).mul_(width).sum(-1)
            within.mul_(width).mul_(local_step(place, ctx.fmt))
        return None, by_offset, by_scale, by_point, None


def slabs(grouped: torch.Tensor) -> list[slice]:
    """Return slices of the rows of ``[rows, groups, group]``, for which a cache is large enough."""
    rows = grouped.shape[0]
    height = max(1, _SLAB * rows // max(grouped.numel(), 1))
    if grouped.device.type != "cpu":
        height = max(rows, 1)
    return [slice(top, min(top + height, rows)) for top in range(0, rows, height)]


class _Through(torch.autograd.Function):
    """Returns a second tensor in the forward pass, the first one's gradient in the backward."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class LearnedWeight:
    """The parameters that decide how one weight is rounded.

    Args:
        grouped: The weight, float32 ``[rows, groups, group]``.
        scale: Effective scale to start from, ``[rows, groups]``.
        zero_point: The same shape, or ``None``.
        fmt: The format of the codes.
        scale_format: What scales are rounded to.
        global_scale: The tensor's scale, for the scale format ``"e4m3"``.
        codes: Numbers of the format to start from, of the shape of ``grouped``; the nearest ones
            if left out.
        mask: Boolean, of the shape of ``grouped``, or ``None``; where it is false the weight is
            zero, and its offset stays zero too.

    Attributes:
        offset: ``[rows, groups, group]``, in steps.
        factor: ``[rows, groups]``, what the scale is multiplied with.
        shift: ``[rows, groups]``, what the zero point is moved by, in steps; ``None`` without one.
    """

    def __init__(
        self,
        grouped: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        fmt: NumberFormat,
        *,
        scale_format: ScaleFormat = "fp32",
        global_scale: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        self.grouped, self.format = grouped, fmt
        self._scale, self._zero_point = scale, zero_point
        self._scale_format, self._level = scale_format, global_scale
        self.offset = self._first_offset(codes).requires_grad_(True)
        self.factor = torch.ones_like(scale).requires_grad_(True)
        self.shift = None
        if zero_point is not None:
            self.shift = torch.zeros_like(scale).requires_grad_(True)
        self._bound = self.offset.detach().abs().clamp_min(0.5)
        if mask is not None:
            self._bound *= mask

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Everything that is learned: offsets first, then what belongs to scales."""
        return [p for p in (self.offset, self.factor, self.shift) if p is not None]

    def rates(self, schedule: Schedule) -> list[float]:
        """Return the learning rate of each parameter.

        A factor on the scale moves the largest values most. Its rate is such that they move by
        ``scale_rate`` steps.
        """
        if isinstance(self.format, FloatFormat):
            steps = 2.0 ** (self.format.mantissa_bits + 1)
        elif isinstance(self.format, TableFormat):
            steps = len(self.format.values) / 2
        else:
            steps = self.format.max_value
        rates = [schedule.rate, schedule.scale_rate / steps, schedule.scale_rate]
        return rates[: len(self.parameters)]

    def scale(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return effective scale and zero point as they are now, differentiable."""
        wanted = self._scale * self.factor
        scale = wanted
        if self._scale_format != "fp32":
            rounded = round_scale(wanted.detach(), self._scale_format, self._level)
            scale = through(wanted, rounded)
        if self._zero_point is None or self.shift is None:
            return scale, None
        # Shrinking the scale keeps the middle of the range where it was.
        middle = (self.format.max_value + self.format.min_value) / 2
        wanted = (self._zero_point - middle) / self.factor + middle + self.shift
        whole = wanted.detach().round().clamp(self.format.min_value, self.format.max_value)
        return scale, through(wanted, whole)

    def codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return numbers of the format, scale and zero point as they are now."""
        with torch.no_grad():
            scale, zero_point = self.scale()
            values = self.grouped / scale.unsqueeze(-1)
            values += self.offset * local_step(values, self.format)
            if zero_point is not None:
                values.round_().add_(zero_point.unsqueeze(-1))
            return round_to_(values, self.format), scale, zero_point

    def values(self) -> torch.Tensor:
        """Return the weight as it is rounded now, ``[rows, groups, group]``, differentiable."""
        scale, zero_point = self.scale()
        result: torch.Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self.grouped, self.offset, scale, zero_point, self.format
        )
        return result

    def clamp(self) -> None:
        """Put parameters back into their range."""
        with torch.no_grad():
            self.offset.clamp_(-self._bound, self._bound)
            self.factor.clamp_(_LEAST, _MOST)

    def _first_offset(self, codes: torch.Tensor | None) -> torch.Tensor:
        if codes is None:
            return torch.zeros_like(self.grouped)
        nearest = quantize(self.grouped, self._scale, self._zero_point, self.format)
        place = self.grouped / self._scale.unsqueeze(-1)
        wanted = codes
        if self._zero_point is not None:
            wanted = codes - self._zero_point.unsqueeze(-1)
        edge = _EDGE if isinstance(self.format, IntegerFormat) else 0.0
        moved = (place.clamp(wanted - edge, wanted + edge) - place) / local_step(place, self.format)
        return torch.where(nearest == codes, torch.zeros_like(moved), moved)


def local_step(values: torch.Tensor, fmt: NumberFormat) -> torch.Tensor | float:
    """Return how far numbers of a format lie apart around each value: float32, or one number."""
    if isinstance(fmt, FloatFormat):
        size = values.abs().clamp(fmt.smallest_normal, fmt.max_value)
        return torch.exp2(torch.frexp(size).exponent - 1.0 - fmt.mantissa_bits)
    if isinstance(fmt, TableFormat):
        table = torch.tensor(fmt.values, device=values.device)
        above = torch.searchsorted(table, values.contiguous()).clamp(1, len(table) - 1)
        return table[above] - table[above - 1]
    return 1.0


def through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return ``rounded``, with the gradient of ``values``."""
    result: torch.Tensor = _Through.apply(values, rounded)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Schedule:
    """How parameters are learned.

    Attributes:
        iterations: Steps of the optimizer.
        rate: Learning rate of offsets; falls linearly to zero. With ``"sign"``, an offset can move
            by ``rate * iterations / 2`` at most.
        scale_rate: The same of scales and zero points.
        optimizer: ``"sign"`` moves by the sign of the gradient, ``"adam"`` as Kingma & Ba 2014.
    """

    iterations: int
    rate: float
    scale_rate: float
    optimizer: Optimizer = "sign"


def learn(
    weights: Sequence[LearnedWeight],
    loss: Callable[[int], torch.Tensor],
    schedule: Schedule,
) -> list[float]:
    """Learn the parameters of all weights of a block together, in place.

    Args:
        weights: The weights; ``loss`` reads them.
        loss: Computes the loss of a step, given its number from 0.
        schedule: How.

    Returns:
        The loss at every step.
    """
    groups = [
        {"params": [p], "base": rate}
        for weight in weights
        for p, rate in zip(weight.parameters, weight.rates(schedule), strict=True)
    ]
    parameters: list[torch.Tensor] = [group["params"][0] for group in groups]  # type: ignore[index]
    adam = torch.optim.Adam(groups, lr=schedule.rate, betas=(0.9, 0.95))
    history = []
    for step in range(schedule.iterations):
        value = loss(step)
        history.append(float(value.detach()))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        remaining = 1 - step / schedule.iterations
        with torch.no_grad():
            for group, parameter, gradient in zip(
                adam.param_groups, parameters, gradients, strict=True
            ):
                group["lr"] = group["base"] * remaining
                if gradient is not None and schedule.optimizer == "sign":
                    parameter.sub_(gradient.sign(), alpha=group["lr"])
                parameter.grad = gradient
            if schedule.optimizer == "adam":
                adam.step()
        for weight in weights:
            weight.clamp()
    for parameter in parameters:
        parameter.grad = None
    return history
