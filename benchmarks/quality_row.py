# SPDX-License-Identifier: Apache-2.0
"""One row of ``benchmarks/quality.py``: a recipe, in a process of its own."""

from __future__ import annotations

from quality import optimize

if __name__ == "__main__":
    from measure import run

    run("modewright", optimize)
