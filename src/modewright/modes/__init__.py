# SPDX-License-Identifier: Apache-2.0
"""The mode engine: what a mode is, how modes follow one another, how they are recorded.

Read in this order: ``descriptor`` (what a mode is), ``registry`` (where modes are found),
``sequence`` (what may follow what), ``apply`` (how a sequence runs), ``snapshot`` (how a failure is
undone), ``state`` (what is remembered), ``checkpoint`` (how it is saved), ``searcher``.
The engine knows no algorithm.
"""
