from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modewright.layers.masks import (
    MaskedLayer,
    add_masks,
    mask_of,
    masked_parameters,
    remove_masks,
    set_masked,
    without_masks,
)
from modewright.layers.matrices import (
    from_matrix,
    matrix_parameters,
    multiplies_rows,
    rows_of,
    to_matrix,
)
from support.models import MOE

OPTIMIZERS = {
    "sgd with momentum and decay": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


def masked_linear() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    mask = torch.rand(4, 8) > 0.5
    add_masks(layer, ["weight"])
    set_masked(layer, "weight", layer.weight.detach(), mask)
    return layer, mask


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_whatever_the_optimizer_does(make: object) -> None:
    layer, mask = masked_linear()
    optimizer = make(layer.parameters())  # type: ignore[operator]
    before = layer.weight.detach().clone()

    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()

    assert not layer.weight[~mask].any()
    assert not dict(layer.named_parameters())["weight"][~mask].any()
    assert not torch.equal(layer.weight, before)


def test_zeros_stay_if_something_writes_over_the_parameter() -> None:
    layer, mask = masked_linear()
    with torch.no_grad():
        dict(layer.named_parameters())["weight"].fill_(1.0)

    assert torch.equal(layer.weight, mask.float())
    assert torch.allclose(layer(torch.ones(1, 8)) - layer.bias, mask.float().sum(1))


def test_names_class_and_keys_stay_and_a_mask_is_saved() -> None:
    layer, _ = masked_linear()

    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, MaskedLayer)
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask"]
    assert masked_parameters(layer) == ("weight",)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    assert layer.half().weight.dtype == torch.float16
    assert mask_of(layer).dtype == torch.bool  # type: ignore[union-attr]


def test_removing_masks_leaves_a_plain_layer_that_computes_the_same() -> None:
    layer, _ = masked_linear()
    x = torch.randn(3, 8)
    expected = layer(x)

    remove_masks(layer)

    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), expected)


def test_without_masks_a_layer_reads_its_parameter() -> None:
    layer, mask = masked_linear()
    with torch.no_grad():
        dict(layer.named_parameters())["weight"].fill_(1.0)
    with without_masks(layer):
        assert layer.weight.all()

    assert torch.equal(layer.weight.bool(), mask)


LAYERS = {
    "linear": (nn.Linear(6, 4), torch.randn(2, 3, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 9)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), dilation=2, padding=2), torch.randn(2, 2, 7, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding_mode="circular", padding=1), torch.randn(1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize(("layer", "x"), LAYERS.values(), ids=LAYERS)
def test_rows_times_the_matrix_are_the_output(layer: nn.Module, x: torch.Tensor) -> None:
    matrix = to_matrix(layer, "weight", layer.weight)
    product = rows_of(layer, x) @ matrix.t() + layer.bias
    expected = layer(x)
    if not isinstance(layer, nn.Linear):
        expected = expected.movedim(1, -1)

    assert multiplies_rows(layer)
    assert torch.allclose(product, expected.flatten(0, -2), atol=1e-5)
    assert torch.equal(from_matrix(layer, "weight", matrix), layer.weight)


def test_every_matrix_goes_back_to_the_shape_of_its_parameter() -> None:
    layers = [nn.ConvTranspose2d(4, 6, 3), nn.MultiheadAttention(8, 2), *MOE.make().modules()]
    seen = 0
    for layer in layers:
        for name in matrix_parameters(layer):
            value = getattr(layer, name)
            matrix = to_matrix(layer, name, value)
            assert matrix.ndim == 2
            assert torch.equal(from_matrix(layer, name, matrix), value)
            seen += value.ndim == 3
    assert seen  # fused experts are among them
