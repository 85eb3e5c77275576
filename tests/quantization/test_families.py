# SPDX-License-Identifier: Apache-2.0
"""Every scheme works on every family of layers: quantize, calibrate, run, count, fold."""

from __future__ import annotations

import pytest
import torch

import modewright
from modewright.quantization.convert import quantizers
from modewright.quantization.schemes import SCHEMES
from modewright.quantization.size import packed_bytes
from support.models import FAMILIES, Family

WITH_WEIGHTS = [name for name, scheme in SCHEMES.items() if scheme.weights is not None]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scheme", WITH_WEIGHTS)
def test_a_scheme_on_a_family(scheme: str, family: Family) -> None:
    plain = family.run(family.make())
    model = modewright.quantize(family.make(), scheme, calibration=family.batches)
    found = family.run(model)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)
    assert all(q.scale is not None or q.config.dynamic for name, q in quantizers(model).items())
    layers = modewright.mode_state(model)["modes"][0]["metadata"]["layers"]
    size = packed_bytes(model, layers)
    folded = modewright.apply_mode(model, "export_quantize")
    assert not quantizers(folded)
    assert packed_bytes(folded, layers) == size
    if SCHEMES[scheme].input_activations is None:
        torch.testing.assert_close(family.run(folded), found, rtol=1e-5, atol=1e-5)
