# SPDX-License-Identifier: Apache-2.0
"""Running the command line in this process."""

from __future__ import annotations

import pytest

from modewright.cli import main


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    shown = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else -1), shown.out, shown.err
