# SPDX-License-Identifier: Apache-2.0
"""Models whose parameters take no memory."""

from __future__ import annotations

import torch
from torch import nn

from modewright.modes.empty import has_lost_buffers, parameters_on_meta
from support.models import FAMILIES, LM, TinyLm


def test_parameters_are_empty_and_buffers_are_real() -> None:
    with parameters_on_meta():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not has_lost_buffers(model)
    assert not nn.Linear(2, 2).weight.is_meta


def test_names_shapes_dtypes_and_ties_are_those_of_the_real_model() -> None:
    for family in FAMILIES:
        with parameters_on_meta():
            model = family.cls()
        real = family.cls()
        for (name, own), (other, parameter) in zip(
            model.named_parameters(), real.named_parameters(), strict=True
        ):
            assert (name, own.shape, own.dtype) == (other, parameter.shape, parameter.dtype)
            assert own.requires_grad == parameter.requires_grad
    with parameters_on_meta():
        tied = TinyLm()
    assert tied.head.weight is tied.embed.weight


def test_flags_and_attributes_of_parameters_stay() -> None:
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.note = "kept"  # type: ignore[attr-defined]
    module = nn.Module()
    with parameters_on_meta():
        module.p = parameter

    assert module.p.is_meta
    assert not module.p.requires_grad
    assert module.p.note == "kept"


def test_buffers_made_from_parameters_are_found() -> None:
    with parameters_on_meta():
        model = LM.cls()
        model.register_buffer("sums", model.embed.weight.detach().sum(0), persistent=False)

    assert has_lost_buffers(model)
