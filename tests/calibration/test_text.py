# SPDX-License-Identifier: Apache-2.0
"""Where text comes from, which side of the split it is on, and how it is cut into windows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modewright.calibration.text import (
    PASSAGE_CHARACTERS,
    fingerprint,
    load_documents,
    make_windows,
)
from modewright.errors import ConfigError, DataError

SPLITS = ("calibration", "evaluation")


def load_both(source: str | Path | list[str]) -> tuple[list[str], list[str]]:
    """Both splits of a source; empty where a split has nothing."""
    loaded = []
    for split in SPLITS:
        try:
            loaded.append(load_documents(source, split))
        except DataError:
            loaded.append([])
    return loaded[0], loaded[1]


def some_texts(count: int) -> list[str]:
    return [f"This is text number {i}." for i in range(count)]


def one_id_per_character(text: str) -> list[int]:
    return [ord(c) for c in text]


# --- the split -----------------------------------------------------------------------------------


def test_builtin_corpus_is_large_and_split_about_one_to_three() -> None:
    calibration, evaluation = load_both("builtin")

    characters = [sum(map(len, side)) for side in (calibration, evaluation)]
    assert sum(characters) > 300_000
    assert 0.1 < characters[1] / sum(characters) < 0.4
    assert max(map(len, calibration + evaluation)) <= PASSAGE_CHARACTERS


def test_split_is_the_same_in_every_process() -> None:
    # Fixed by SHA-256 alone: these may never move, or old reports would no longer be comparable.
    texts = some_texts(8)

    assert load_documents(texts, "evaluation") == [texts[2], texts[4], texts[5]]


documents_strategy = st.lists(
    st.text(alphabet=st.sampled_from("ab \n\t\r."), max_size=40), max_size=12
)


@settings(deadline=None)
@given(documents_strategy, documents_strategy)
def test_no_passage_is_on_both_sides_even_across_sources(a: list[str], b: list[str]) -> None:
    calibration = set(load_both(a + b + a)[0])
    evaluation = set(load_both(b + a)[1])

    assert not calibration & evaluation


@settings(deadline=None)
@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=3000), min_size=1, max_size=10),
    st.sampled_from(["\n\n", "\n", "\r\n\r\n", "\n \t\n\n"]),
)
def test_cutting_loses_no_text_and_respects_the_size(blocks: list[str], joint: str) -> None:
    calibration, evaluation = load_both([joint.join(blocks)])

    passages = calibration + evaluation
    assert all(0 < len(p) <= PASSAGE_CHARACTERS for p in passages)
    assert all(p == p.strip() for p in passages)
    kept = sorted(re.sub(r"\s", "", "".join(passages)))
    assert kept == sorted(re.sub(r"\s", "", "".join(blocks)))


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), max_size=10))
def test_any_text_is_on_exactly_one_side(texts: list[str]) -> None:
    calibration, evaluation = load_both(texts)

    assert len(calibration) + len(evaluation) == sum(
        bool(t.replace("\r", "\n").strip()) for t in texts
    )


@settings(deadline=None)
@given(st.integers(min_value=2, max_value=30), st.integers(min_value=0, max_value=5))
def test_windows_of_the_two_sides_share_no_token_position(length: int, seed: int) -> None:
    # Every passage has its own token id, so equal ids would mean shared text.
    texts = some_texts(60)
    numbers = {text: number for number, text in enumerate(texts)}

    windows = [
        make_windows(side, lambda t: [numbers[t]] * 40, length=length, count=10, seed=seed)
        for side in load_both([*texts, *texts[:30]])
    ]

    assert not set(windows[0].flatten().tolist()) & set(windows[1].flatten().tolist())


def test_white_space_at_ends_and_line_endings_do_not_move_a_passage() -> None:
    texts = some_texts(40)
    sloppy = [f"\r\n  {text}\n\n" for text in texts]

    assert load_both(sloppy) == load_both(texts)


def test_empty_split_says_how_much_text_there_was() -> None:
    with pytest.raises(DataError, match=r"evaluation split.*1 passages with 22 characters"):
        load_documents(["This is text number 0."], "evaluation")
    with pytest.raises(DataError, match="0 passages"):
        load_documents(["", "  \n "], "calibration")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="'train'"):
        load_documents("builtin", "train")  # type: ignore[arg-type]


# --- sources -------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("\n\n".join(some_texts(3)), encoding="utf-8")
    (tmp_path / "a.md").write_text("# Title\n", encoding="utf-8-sig")
    (tmp_path / "sub" / "c.jsonl").write_text(
        '{"text": "row one\\u2028more"}\n\n{"text": "row two", "id": 2}\n', encoding="utf-8"
    )
    (tmp_path / "ignored.csv").write_text("1,2")

    both = load_both(tmp_path)

    found = ["# Title", "\n\n".join(some_texts(3)), "row one\u2028more", "row two"]
    assert sorted(both[0] + both[1]) == sorted(found)
    assert both[0] == [text for text in found if text in both[0]]  # sorted by path
    assert load_both(str(tmp_path)) == both
    single = load_both(tmp_path / "b.txt")
    assert single[0] + single[1] == [found[1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows\.jsonl:2.*one JSON object"),
        ("[1]", r"rows\.jsonl:2.*got list"),
        ('{"body": "x"}', r"rows\.jsonl:2.*'text'.*\['body'\]"),
        ('{"text": 3}', r"rows\.jsonl:2.*expected text, got int"),
        ('{"text": "\\ud800"}', r"rows\.jsonl:2.*surrogate"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n", encoding="utf-8")

    with pytest.raises(DataError, match=message):
        load_documents(path, "calibration")


class FakeDatasets:
    """Stands for the package datasets: one dataset with splits, and one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    class Table(list[dict[str, Any]]):
        @property
        def column_names(self) -> list[str]:
            return list(self[0])

    def load_dataset(self, name: str) -> dict[str, Table]:
        if name != "owner/name":
            raise FileNotFoundError(f"no dataset {name}")
        rows = [{"text": text, "body": text.upper(), "id": 1} for text in some_texts(20)]
        return {"test": self.Table([{"text": "not this"}]), "train": self.Table(rows)}

    def load_from_disk(self, folder: Path) -> Table:
        assert folder == self.folder
        return self.Table([{"text": text + " local"} for text in some_texts(20)])


def test_datasets_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(tmp_path))  # type: ignore[arg-type]

    assert load_both("datasets:owner/name") == load_both(some_texts(20))
    upper = [text.upper() for text in some_texts(20)]
    assert load_both("datasets:owner/name:body") == load_both(upper)
    local = [text + " local" for text in some_texts(20)]
    assert load_both(f"datasets:{tmp_path}") == load_both(local)
    for source, message in (
        ("datasets:owner/name:nothing", "no column 'nothing' but text, body, id"),
        ("datasets:owner/name:id", "row 0 of the dataset 'owner/name': expected text, got int"),
        ("datasets:other", "'other' cannot be loaded: no dataset other"),
    ):
        with pytest.raises(DataError, match=message):
            load_documents(source, "calibration")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="pip install datasets"):
        load_documents("datasets:owner/name", "calibration")


def test_unusable_sources(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "table.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()

    with pytest.raises(DataError, match=r"latin\.txt.*not UTF-8"):
        load_documents(tmp_path / "latin.txt", "calibration")
    with pytest.raises(DataError, match=r"\.csv"):
        load_documents(tmp_path / "table.csv", "calibration")
    with pytest.raises(DataError, match=r"holds no \.txt, \.md or \.jsonl file"):
        load_documents(tmp_path / "empty", "calibration")
    with pytest.raises(DataError, match="No text found at 'nowhere'"):
        load_documents("nowhere", "calibration")
    with pytest.raises(DataError, match="item 1 of the given iterable: expected text, got bytes"):
        load_documents(["a", b"b"], "calibration")  # type: ignore[list-item]
    with pytest.raises(DataError, match="got int"):
        load_documents(3, "calibration")  # type: ignore[arg-type]


# --- windows -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 20), st.integers(0, 2**31), st.integers(0, 200))
def test_windows_are_disjoint_pieces_of_the_stream_in_order(
    length: int, count: int, seed: int, size: int
) -> None:
    documents = [
        "".join(chr(i) for i in range(size // 2)),
        "".join(map(chr, range(size // 2, size))),
    ]
    if size // length < count:
        with pytest.raises(DataError, match=f"hold only {size // length}"):
            make_windows(documents, one_id_per_character, length=length, count=count, seed=seed)
        return

    windows = make_windows(documents, one_id_per_character, length=length, count=count, seed=seed)

    assert windows.dtype == torch.int64
    assert windows.shape == (count, length)
    flat = windows.flatten().tolist()
    assert flat == sorted(set(flat))  # ids are positions here: no overlap, in order
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))
    assert all(start % length == 0 for start in windows[:, 0].tolist())


def test_windows_cover_the_text_evenly_and_follow_the_seed() -> None:
    text = ["".join(map(chr, range(1000)))]

    def cut(seed: int) -> torch.Tensor:
        return make_windows(text, one_id_per_character, length=10, count=10, seed=seed)

    assert (cut(0)[:, 0] // 100).tolist() == list(range(10))
    assert torch.equal(cut(1), cut(1))
    assert not torch.equal(cut(0), cut(1))


def test_windows_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()

    make_windows(["abcdef"], one_id_per_character, length=2, count=2)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_windows_refuse_nonsense() -> None:
    with pytest.raises(ConfigError, match="length"):
        make_windows(["abc"], one_id_per_character, length=0, count=1)
    with pytest.raises(ConfigError, match="count"):
        make_windows(["abc"], one_id_per_character, length=1, count=0)
    with pytest.raises(DataError, match="one text"):
        make_windows("abc", one_id_per_character, length=1, count=1)
    with pytest.raises(DataError, match=r"Lower the number of windows to 1.*length to 1 or less"):
        make_windows(["abc"], one_id_per_character, length=2, count=2)


# --- fingerprints --------------------------------------------------------------------------------


def test_equal_data_has_equal_fingerprints() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)

    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    assert fingerprint([tensor]) == fingerprint(iter([tensor.clone()])) == fingerprint((tensor,))
    assert fingerprint([{"a": 1, "b": tensor}]) == fingerprint([{"b": tensor, "a": 1}])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", fingerprint(tensor))


def test_different_data_has_different_fingerprints() -> None:
    zeros = torch.zeros(4)
    different = [
        zeros,
        -zeros,
        zeros.double(),
        zeros.int(),
        zeros.view(2, 2),
        [zeros],
        [zeros, zeros],
        [[zeros, zeros]],
        torch.empty(0),
        torch.tensor(0.0),
        torch.zeros(2, dtype=torch.bfloat16),
        [],
        [[]],
        {},
        ["ab"],
        ["a", "b"],
        [b"ab"],
        [1],
        [True],
        [1.0],
        ["1"],
        [None],
        {"a": 1},
        {"a": 2},
        {1: 1},
    ]

    assert len({fingerprint(data) for data in different}) == len(different)


def test_fingerprint_names_what_it_cannot_take() -> None:
    with pytest.raises(DataError, match=r"batches\[1\]\['x'\].*set"):
        fingerprint([1, {"x": {3}}])
    with pytest.raises(DataError, match="dense"):
        fingerprint(torch.eye(2).to_sparse())
