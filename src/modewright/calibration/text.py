# SPDX-License-Identifier: Apache-2.0
"""Text sources, the split into calibration and evaluation text, and windows of tokens.

Calibration must not see the text that later judges its result. The split is therefore a property
of the text itself: a source is cut into passages, and the SHA-256 of a passage says which side it
is on. Nothing depends on order, on file names or on what else was loaded, so a passage that
occurs twice, or in two sources, always falls on the same side, and no passage is on both.

What this guarantees and what it does not: every token of a calibration window comes from passages
that evaluation never sees, and the other way round. Two *different* passages may still contain
the same sentence, and a text that reaches two sources embedded in different surroundings can be
cut at different places. For such data remove near-duplicates before loading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from modewright.errors import ConfigError, DataError

Split = Literal["calibration", "evaluation"]

PASSAGE_CHARACTERS = 4000
"""About how long a passage may grow, in characters; longer documents are cut."""

_SUFFIXES = (".txt", ".md", ".jsonl")
_DATASETS = "datasets:"
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_Located = tuple[str, str]  # (where a document was found, its text)


def load_documents(source: str | Path | Iterable[str], split: Split) -> list[str]:
    """Load the passages of a source that belong to one split, in the order of the source.

    A topic of the builtin corpus, a text file, a row of a JSONL file or of a dataset and an item of
    an iterable is one document. Documents longer than about 4000 characters are cut at blank lines
    (and where there is none, at line ends, and at last anywhere) into passages of about that size.
    About one passage in four belongs to ``"evaluation"``, the others to ``"calibration"``.

    Args:
        source: ``"builtin"`` (the Python language reference that every CPython carries, some 460
            thousand characters; its text varies a little between Python versions), a ``.txt`` or
            ``.md`` file, a ``.jsonl`` file (one JSON object a line with the text under the key
            ``"text"``), a folder of such files (searched recursively, taken in sorted order),
            ``"datasets:NAME"`` or ``"datasets:NAME:COLUMN"`` (a dataset of Hugging Face, or a
            folder that its library saved; the rows of its train split; the column ``"text"`` if
            none is named), or an iterable of strings.
        split: ``"calibration"`` or ``"evaluation"``.

    Returns:
        The passages, stripped of white space at their ends; never empty.

    Raises:
        ConfigError: ``split`` is neither of the two names.
        DataError: The source is missing, of an unknown kind, not UTF-8, not text, or holds no
            passage of this split.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split: expected 'calibration' or 'evaluation', got {split!r}.")
    passages = [p for where, text in _documents(source) for p in _passages(where, text)]
    chosen = [passage for passage in passages if _split_of(passage) == split]
    if not chosen:
        characters = sum(map(len, passages))
        name = repr(str(source)) if isinstance(source, (str, Path)) else "the given strings"
        raise DataError(
            f"The {split} split of {name} is empty: it holds {len(passages)} passages with "
            f"{characters} characters in all, and none of them belongs to this split. About one "
            "passage in four is for evaluation, the others are for calibration: give more text "
            "(20 passages or more, each up to 4000 characters)."
        )
    return chosen


def _documents(source: str | Path | Iterable[str]) -> Iterator[_Located]:
    """Yield every document of a source with the place it came from."""
    if isinstance(source, str) and source == "builtin":
        yield from _builtin_documents()
    elif isinstance(source, str) and source.startswith(_DATASETS):
        yield from _dataset_documents(source)
    elif isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _folder_documents(path)
        elif path.is_file():
            yield from _file_documents(path)
        else:
            raise DataError(
                f"No text found at {str(source)!r}: expected 'builtin', a {_kinds()} file, a "
                "folder of such files, 'datasets:NAME', or an iterable of strings (put a single "
                "text in a list)."
            )
    elif isinstance(source, Iterable):
        for index, item in enumerate(source):
            where = f"item {index} of the given iterable"
            yield where, _checked(item, where)
    else:
        raise DataError(
            f"A text source is 'builtin', a path or an iterable of strings, got "
            f"{type(source).__name__}."
        )


def _kinds() -> str:
    return ", ".join(_SUFFIXES[:-1]) + " or " + _SUFFIXES[-1]


def _builtin_documents() -> Iterator[_Located]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "The builtin text is the module pydoc_data.topics of the Python standard library, "
            "which this Python lacks. Install the full standard library, or name a text file."
        ) from error
    for name in sorted(topics):
        yield f"builtin topic {name!r}", topics[name]


def _dataset_documents(source: str) -> Iterator[_Located]:
    """Yield the rows of a dataset of Hugging Face."""
    name, _, column = source.removeprefix(_DATASETS).partition(":")
    column = column or "text"
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"The text {source!r} needs the package datasets, which is not installed: "
            "pip install datasets."
        ) from error
    try:
        folder = Path(name).expanduser()
        local = folder.is_dir()
        rows = datasets.load_from_disk(folder) if local else datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise DataError(f"The dataset {name!r} cannot be loaded: {error}") from error
    if isinstance(rows, Mapping):  # a dataset with splits
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    if column not in rows.column_names:
        raise DataError(
            f"The dataset {name!r} has no column {column!r} but {', '.join(rows.column_names)}: "
            f"name one of them as '{_DATASETS}{name}:COLUMN'."
        )
    for index, row in enumerate(rows):
        where = f"row {index} of the dataset {name!r}"
        yield where, _checked(row[column], where)


def _folder_documents(folder: Path) -> Iterator[_Located]:
    files = [p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()]
    if not files:
        raise DataError(f"The folder {str(folder)!r} holds no {_kinds()} file.")
    for path in sorted(files, key=lambda p: p.relative_to(folder).as_posix()):
        yield from _file_documents(path)


def _file_documents(path: Path) -> Iterator[_Located]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"Cannot take text from {str(path)!r}: expected a {_kinds()} file, got the suffix "
            f"{path.suffix!r}. Rename or convert the file."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8 text (byte {error.start}: {error.reason}). "
            "Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {str(path)!r}: {error}.") from error
    if suffix != ".jsonl":
        yield str(path), text
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it cuts at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _row_text(line, where)


def _row_text(line: str, where: str) -> str:
    """Return the text of one JSONL line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object a line, got {error}.") from error
    if not isinstance(row, dict) or "text" not in row:
        got = f"the keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: expected a JSON object with the key 'text', got {got}.")
    return _checked(row["text"], where)


def _checked(value: object, where: str) -> str:
    """Return ``value`` if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair, which is not text. "
            "Repair or drop this document."
        ) from error
    return value


def _passages(where: str, document: str) -> list[str]:
    """Cut a document into stripped, non-empty passages of about 4000 characters at most."""
    text = _checked(document, where).replace("\r\n", "\n").replace("\r", "\n")
    if len(text.strip()) <= PASSAGE_CHARACTERS:
        parts = [text]
    else:
        parts = _packed(
            [line for block in _BLANK_LINES.split(text) for line in _short(block)], "\n\n"
        )
    return [part.strip() for part in parts if part.strip()]


def _short(block: str) -> list[str]:
    """Cut a block without blank lines that is too long at line ends, or anywhere if it must be."""
    if len(block) <= PASSAGE_CHARACTERS:
        return [block]
    pieces = [
        line[start : start + PASSAGE_CHARACTERS]
        for line in block.split("\n")
        for start in range(0, max(len(line), 1), PASSAGE_CHARACTERS)
    ]
    return _packed(pieces, "\n")


def _packed(pieces: Iterable[str], joint: str) -> list[str]:
    """Join neighbours for as long as the result stays within the size of a passage."""
    packed: list[str] = []
    for piece in pieces:
        if packed and len(packed[-1]) + len(joint) + len(piece) <= PASSAGE_CHARACTERS:
            packed[-1] += joint + piece
        else:
            packed.append(piece)
    return packed


def _split_of(passage: str) -> Split:
    """Return the side a passage is on: a quarter of all hashes means evaluation."""
    first_byte = hashlib.sha256(passage.encode("utf-8")).digest()[0]
    return "evaluation" if first_byte < 64 else "calibration"


def make_windows(
    documents: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    length: int,
    count: int,
    seed: int = 0,
) -> torch.Tensor:
    """Cut windows of tokens from documents that are joined into one stream.

    The stream is divided into as many windows as fit, one after another. These are divided into
    ``count`` runs of equal size, and one window is drawn from each run, so that the choice covers
    the whole text, never overlaps and is the same for the same arguments. The global random
    generator of torch is not used.

    Args:
        documents: Texts, tokenized one by one and joined in this order without a separator.
        encode: Maps a text to its token ids, without special tokens.
        length: Tokens in a window.
        count: Number of windows.
        seed: Which of the possible choices to make.

    Returns:
        Token ids, int64, shape ``[count, length]``, in the order of the text.

    Raises:
        ConfigError: ``length`` or ``count`` is less than 1.
        DataError: The documents hold fewer than ``count`` windows.
    """
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise ConfigError(f"{name}: expected 1 or more, got {value}.")
    if isinstance(documents, str):
        raise DataError("documents: expected a list of texts, got one text. Put it in a list.")
    stream: list[int] = []
    for document in documents:
        stream.extend(encode(document))
    available = len(stream) // length
    if available < count:
        raise DataError(
            f"{count} windows of {length} tokens were asked for, but {len(documents)} documents "
            f"with {len(stream)} tokens hold only {available}. Lower the number of windows to "
            f"{available or 'what fits'}, lower their length to {len(stream) // count} or less, "
            "or give more text."
        )
    windows = torch.tensor(stream[: available * length], dtype=torch.int64).view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for index in range(count):
        low, high = index * available // count, (index + 1) * available // count
        chosen.append(low + int(torch.randint(high - low, (1,), generator=generator)))
    return windows[chosen]


def fingerprint(batches: torch.Tensor | Iterable[Any]) -> str:
    """Return ``"sha256:..."`` over data, to record what a model was calibrated with.

    Tensors count with dtype, shape and exact bits, wherever they are stored; lists and tuples
    with their order; mappings without it. Equal data has equal fingerprints in every process.

    Args:
        batches: A tensor, or any iterable (a generator is consumed) of nested lists, tuples and
            mappings of tensors, strings, bytes, numbers, booleans and ``None``.

    Raises:
        DataError: Something else is in there.
    """
    nested = isinstance(batches, (torch.Tensor, Mapping, list, tuple, str, bytes))
    digest = hashlib.sha256()
    for part in _canonical(batches if nested else list(batches), "batches"):
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _canonical(value: object, where: str) -> Iterator[bytes]:
    """Yield bytes that spell ``value`` unambiguously: each part has its kind and length."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            raise DataError(f"{where}: expected a dense tensor, got the layout {value.layout}.")
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for key in sorted(value, key=lambda k: (type(k).__name__, str(k))):
            yield from _canonical(key, f"a key of {where}")
            yield from _canonical(value[key], f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)};".encode()
        for index, item in enumerate(value):
            yield from _canonical(item, f"{where}[{index}]")
    elif isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        yield f"{type(value).__name__} {len(data)};".encode()
        yield data
    elif value is None or isinstance(value, (bool, int, float)):
        yield f"{type(value).__name__} {value!r};".encode()
    else:
        raise DataError(
            f"{where}: cannot fingerprint a {type(value).__name__}. Expected tensors, strings, "
            "bytes, numbers, booleans, None, and lists, tuples or mappings of them."
        )
