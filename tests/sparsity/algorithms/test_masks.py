from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.errors import ConfigError
from modewright.sparsity.algorithms.masks import choose_mask, follows
from modewright.sparsity.pattern import parse_pattern


def best_by_trying(scores: torch.Tensor, kept: int) -> float:
    """The largest sum of ``kept`` of a few scores, by trying all choices."""
    return max(
        float(sum(scores[i] for i in chosen))
        for chosen in itertools.combinations(range(len(scores)), kept)
    )


@settings(deadline=None, max_examples=40)
@given(
    pattern=st.sampled_from(["1:2", "2:4", "3:4", "4:8", "3:6"]),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_n_to_m_keeps_what_is_worth_most_in_every_group(
    pattern: str, seed: int, ties: bool
) -> None:
    parsed = parse_pattern(pattern)
    scores = torch.rand(3, 2 * parsed.of, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = (scores * 3).round()

    mask = choose_mask(scores, parsed)

    assert follows(mask, parsed)
    for row, kept in zip(scores, mask, strict=True):
        for group, chosen in zip(row.split(parsed.of), kept.split(parsed.of), strict=True):
            assert int(chosen.sum()) == parsed.kept
            assert float(group[chosen].sum()) == pytest.approx(best_by_trying(group, parsed.kept))


def test_many_of_many_are_chosen_as_few_are() -> None:
    scores = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))

    mask = choose_mask(scores, parse_pattern("8:32"))

    top = torch.zeros_like(mask).view(4, 2, 32)
    top.scatter_(-1, scores.view(4, 2, 32).topk(8).indices, True)
    assert torch.equal(mask, top.view(4, 64))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("equal", [False, True])
def test_the_wanted_part_becomes_zero(sparsity: float, by_row: bool, equal: bool) -> None:
    scores = torch.rand(6, 20, generator=torch.Generator().manual_seed(1))
    if equal:
        scores = torch.ones_like(scores)

    mask = choose_mask(scores, parse_pattern("unstructured"), sparsity, by_row=by_row)

    if by_row:
        assert (~mask).sum(1).tolist() == [round(20 * sparsity)] * 6
    assert int((~mask).sum()) == round(120 * sparsity)
    if not equal and sparsity and not by_row:
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("shape", [(8, 8), (7, 10)])
def test_tiles_are_zero_or_not_as_a_whole(shape: tuple[int, int]) -> None:
    pattern = parse_pattern("4x2")
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(2))

    mask = choose_mask(scores, pattern, 0.5)

    assert follows(mask, pattern)
    assert mask.any()
    assert not mask.all()
    if shape == (8, 8):
        sums = scores.reshape(2, 4, 4, 2).sum((1, 3)).flatten()
        kept = mask.reshape(2, 4, 4, 2)[:, 0, :, 0].flatten()
        assert sums[kept].min() >= sums[~kept].max()


def test_follows_sees_a_mask_that_does_not() -> None:
    mask = torch.tensor([[True, True, True, False]])

    assert not follows(mask, parse_pattern("2:4"))
    assert not follows(mask, parse_pattern("1x4"))
    assert follows(mask, parse_pattern("unstructured"))


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "half", "0x4", "2:4:8", ""])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a pattern"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["2:4", "unstructured", "16x16", "4x1"])
def test_a_pattern_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_pattern(text)) == text
