# SPDX-License-Identifier: Apache-2.0
"""Bit equality, largest differences and cosines of tensors."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch.nn import functional

from modewright.errors import DataError
from modewright.evaluation.comparison import (
    cosine_similarity,
    max_abs_difference,
    tensors_identical,
)


def nan_with_payload(bits: int) -> torch.Tensor:
    return torch.tensor([0x7FC00000 | bits], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64],
)
def test_a_tensor_is_identical_to_its_copy(dtype: torch.dtype) -> None:
    tensor = (torch.arange(12) % 5).to(dtype).view(3, 4)

    assert tensors_identical(tensor, tensor.clone())
    assert tensors_identical(tensor.t(), tensor.t().contiguous())
    assert not tensors_identical(tensor, tensor.t())
    assert tensors_identical(tensor[:0], tensor[:0].clone())


def test_bits_decide_and_not_values() -> None:
    zero = torch.zeros(1)

    assert not tensors_identical(zero, -zero)
    assert not tensors_identical(zero, zero.int())
    assert not tensors_identical(zero, zero.double())
    assert not tensors_identical(zero, zero.view(1, 1))
    assert not tensors_identical(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
    assert tensors_identical(nan_with_payload(1), nan_with_payload(1))
    assert not tensors_identical(nan_with_payload(1), nan_with_payload(2))


def test_dictionaries_are_compared_by_key() -> None:
    a = {"x": torch.ones(2), "y": torch.zeros(1)}

    assert tensors_identical(a, {"y": torch.zeros(1), "x": torch.ones(2)})
    assert not tensors_identical(a, {"x": torch.ones(2)})
    assert not tensors_identical(a, {"x": torch.ones(2), "y": torch.ones(1)})
    assert not tensors_identical(a, torch.ones(2))
    with pytest.raises(DataError, match="dense"):
        tensors_identical(torch.eye(2), torch.eye(2).to_sparse())


def test_largest_difference_by_hand() -> None:
    a = torch.tensor([1.0, -2.0, math.inf])
    b = torch.tensor([1.5, 1.0, math.inf])

    assert max_abs_difference(a, b) == 3.0
    assert max_abs_difference(a, a) == 0.0
    assert max_abs_difference(a[:0], b[:0]) == 0.0
    assert max_abs_difference({"p": a, "q": b}, {"p": a, "q": a}) == 3.0
    assert max_abs_difference(a, -a) == math.inf
    assert math.isnan(max_abs_difference(a, b * math.nan))
    # not lost although a larger difference follows
    assert math.isnan(max_abs_difference({"p": a * math.nan, "q": a}, {"p": a, "q": b}))
    assert max_abs_difference(torch.tensor([1], dtype=torch.uint8), torch.tensor([2.5])) == 1.5


def test_largest_difference_refuses_what_does_not_fit() -> None:
    one = torch.ones(1)

    with pytest.raises(DataError, match=r"\[1\] and \[2\]"):
        max_abs_difference(one, torch.ones(2))
    with pytest.raises(DataError, match=r"only the first has \['a'\]"):
        max_abs_difference({"a": one}, {"b": one})
    with pytest.raises(DataError, match="two tensors or two dictionaries"):
        max_abs_difference({"a": one}, one)
    with pytest.raises(DataError, match="a \\(first\\): expected a dense tensor, got int"):
        max_abs_difference({"a": 1}, {"a": one})  # type: ignore[dict-item]


def test_cosine_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 5, 16, generator=generator).unbind()

    expected = functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()

    assert cosine_similarity(a, b) == pytest.approx(float(expected), abs=1e-12)


def test_cosine_by_hand() -> None:
    x, y, zero = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), torch.zeros(2)

    assert cosine_similarity(x, x) == 1.0
    assert cosine_similarity(x, -x) == -1.0
    assert cosine_similarity(x, y) == 0.0
    assert cosine_similarity(zero, zero) == 1.0
    assert cosine_similarity(zero, x) == 0.0
    assert cosine_similarity(torch.stack([x, x]), torch.stack([x, y])) == 0.5
    assert math.isnan(cosine_similarity(x, x * math.nan))
    tiny = torch.tensor([1e-300, 1e-300], dtype=torch.float64)
    assert cosine_similarity(tiny, tiny) == pytest.approx(1.0)
    with pytest.raises(DataError, match="one shape"):
        cosine_similarity(x, torch.ones(3))
    with pytest.raises(DataError, match="one shape"):
        cosine_similarity(x[:0], x[:0])


def test_payload_helper_makes_nans() -> None:
    assert struct.pack("<i", 0x7FC00001) == nan_with_payload(1).view(torch.uint8).numpy().tobytes()
    assert bool(nan_with_payload(1).isnan())
