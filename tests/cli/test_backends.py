# SPDX-License-Identifier: Apache-2.0
"""``modewright backends``."""

from __future__ import annotations

import json

import pytest
import torch

from modewright.cli import main


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["backends", *arguments])
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


def test_it_says_what_serves_which_weights_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEWRIGHT_NATIVE", "0")
    monkeypatch.setenv("COLUMNS", "200")

    code, out, _ = run(capsys=capsys)

    assert code == 0
    for words in ("own kernel", "switched off by MODEWRIGHT_NATIVE=0", "int4pack", "served by"):
        assert words in out


def test_as_json_it_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--json", "--dtype", "bfloat16", capsys=capsys)

    found = json.loads(out)
    assert code == 0
    assert {row["weight"] for row in found["rows"]} >= {"int8 channel", "int4 group 64"}
    assert found["backends"][-1]["name"] == "portable"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_measuring_on_a_gpu_that_is_not_there_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run("--measure", "--device", "cuda", capsys=capsys)

    assert code == 2
    assert "needs a GPU" in err
