# SPDX-License-Identifier: Apache-2.0
"""Which search serves: the kernel library's, or that of tensors."""

from __future__ import annotations

import pytest
import torch

from modewright.formats.catalogue import format_named
from modewright.quantization.algorithms import mse
from modewright.quantization.passes import scales

GROUPED = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "scale_format"), [("fp4_e2m1", "e8m0"), ("fp8_e4m3", "fp32"), ("int4", "e8m0")]
)
def test_what_the_kernel_does_not_know_is_searched_by_tensors(name: str, scale_format: str) -> None:
    fmt = format_named(name)
    found = scales.mse_scale(GROUPED, fmt, scale_format)  # type: ignore[arg-type]
    assert torch.equal(found[0], mse.mse_scale(GROUPED, fmt, scale_format)[0])  # type: ignore[arg-type]


def test_without_the_library_tensors_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEWRIGHT_NATIVE", "0")
    fmt = format_named("uint4")
    found, expected = scales.mse_scale(GROUPED, fmt), mse.mse_scale(GROUPED, fmt)
    assert torch.equal(found[0], expected[0])


def test_half_precision_and_no_values_are_taken() -> None:
    fmt = format_named("uint4")
    low = GROUPED.to(torch.bfloat16)
    found, expected = scales.mse_scale(low, fmt), scales.mse_scale(low.float(), fmt)
    assert torch.equal(found[0], expected[0])
    empty, _ = scales.mse_scale(torch.empty(3, 2, 0), fmt)
    assert empty.shape == (3, 2)
