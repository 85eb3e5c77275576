# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import modewright

FOUND = pkgutil.walk_packages(modewright.__path__, "modewright.")
MODULES = ["modewright", *sorted(m.name for m in FOUND if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)

    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=report.append)

    assert not runner.failures, "".join(report)


def test_the_verbs_have_examples() -> None:
    finder = doctest.DocTestFinder()

    for verb in (modewright.apply_mode, modewright.plan, modewright.load_recipe):
        assert any(test.examples for test in finder.find(verb)), verb
