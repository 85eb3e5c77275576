# SPDX-License-Identifier: Apache-2.0
"""Which dimensions of a network must be cut together, found by watching it run once.

Read in this order: ``atoms`` (the identity of one index of one dimension), ``tracer`` (follows them
through the operations of a run), ``rules`` (what each operation does to them), ``grouping`` (how
identities become groups), ``groups`` (what a group is), ``trace`` (all of it, and the proof).
"""

from modewright.pruning.graph.groups import Attribute, DimensionGraph, DimensionGroup, Slice
from modewright.pruning.graph.trace import trace_dimensions

__all__ = ["Attribute", "DimensionGraph", "DimensionGroup", "Slice", "trace_dimensions"]
