# SPDX-License-Identifier: Apache-2.0
"""Finding which numbers of a Transformers config follow from a cut of widths.

Entries are proposed by their names and values (``intermediate_size`` is a length that was cut, a
number of heads goes down by the same part as a length did) and tried: the right ones are those from
which a model with the shapes of the cut one is built that computes the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from modewright.pruning.model_config import config_problem, set_entries, shapes_problem

Entries = dict[str, Any]
Lengths = frozenset[tuple[int, int]]
_FFN = re.compile(r"intermediate|ffn|inner|d_ff|mlp")
_HIDDEN = re.compile(r"hidden_size|hidden_dim|n_embd|d_model|embed_dim|embed_proj_dim")
_EXPERTS = re.compile(r"num_(local_|routed_)?experts$|n_routed_experts$")
_HEADS = re.compile(r"(num|n)_(attention_|key_value_|kv_)?heads?(_kv)?$|attention_heads$")


def cut_lengths(model: nn.Module, kept: Mapping[str, Mapping[int, torch.Tensor]]) -> Lengths:
    """Return which lengths become which, by what is about to be kept of a model's tensors.

    Args:
        model: The model, not cut yet.
        kept: By path of a tensor and axis the indices that stay.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return frozenset(
        (tensors[path].shape[axis], len(indices))
        for path, axes in kept.items()
        for axis, indices in axes.items()
    )


def find_entries(model: nn.Module, lengths: Lengths) -> Entries | None:
    """Return what a model's config must say after its widths were cut; the config stays as it is.

    Args:
        model: The model, already cut.
        lengths: What :func:`cut_lengths` returned.

    Returns:
        The new entries, empty if the config is right already; those that give the right shapes if
        none make a model that computes the same; ``None`` if there are none, for example because
        widths differ between blocks and the config has one number for all.
    """
    if config_problem(model) is None:
        return {}
    fitting: list[Entries] = []
    before = dict(vars(model.config))
    for entries in _proposals({k: v for k, v in before.items() if k[0] != "_"}, lengths):
        set_entries(model, entries)
        try:
            if shapes_problem(model) is not None:
                continue
            if config_problem(model) is None:
                return entries
            fitting.append(entries)
        finally:
            model.config.__dict__.clear()
            model.config.__dict__.update(before)
    return fitting[0] if fitting else None


def _proposals(config: Mapping[str, Any], lengths: Lengths) -> Iterator[Entries]:
    """Yield entries to try, those that change most kinds of numbers first."""
    kinds: list[list[Entries]] = [
        _lengths_named(config, _FFN, lengths) + _unset(config, lengths),
        _lengths_named(config, _HIDDEN, lengths),
        _lengths_named(config, _EXPERTS, lengths),
        _counts_named(config, lengths),
    ]
    options = [[*found, {}] for found in kinds]
    for parts in itertools.product(*options):
        entries = {key: value for part in parts for key, value in part.items()}
        if entries:
            yield {**entries, **_head_dim(config, entries)}


def _lengths_named(
    config: Mapping[str, Any], pattern: re.Pattern[str], lengths: Lengths
) -> list[Entries]:
    """Return new values of the entries that are lengths of one kind; all change together."""
    found: Entries = {}
    for key, value in config.items():
        new = {n for old, n in lengths if type(value) is int and old == value}
        if pattern.search(key) and len(new) == 1:
            found[key] = new.pop()
    return [found] if found else []


def _unset(config: Mapping[str, Any], lengths: Lengths) -> list[Entries]:
    """Return values for an inner width that is not set and so follows from another number."""
    keys = [key for key, value in config.items() if value is None and _FFN.search(key)]
    return [{key: new} for key in keys for _, new in sorted(lengths)]


def _counts_named(config: Mapping[str, Any], lengths: Lengths) -> list[Entries]:
    """Return new numbers of heads: all go down by the same part as some length did."""
    counts = {
        key: value
        for key, value in config.items()
        if type(value) is int and value > 0 and _HEADS.search(key)
    }
    found: list[Entries] = []
    for old, new in sorted(lengths):
        if counts and all(value * new % old == 0 for value in counts.values()):
            entries = {key: value * new // old for key, value in counts.items()}
            if entries not in found:
                found.append(entries)
    return found


def _head_dim(config: Mapping[str, Any], entries: Entries) -> Entries:
    """Return the width of a head, which must be said once it no longer follows from the others."""
    follows = any(_HIDDEN.search(key) or _HEADS.search(key) for key in entries)
    if not follows or config.get("head_dim") is not None:
        return {}
    hidden = next((v for k, v in config.items() if _HIDDEN.search(k) and type(v) is int), None)
    heads = [v for k, v in config.items() if _HEADS.search(k) and type(v) is int and v > 0]
    return {"head_dim": hidden // max(heads)} if hidden and heads else {}
