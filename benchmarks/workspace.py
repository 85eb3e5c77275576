# SPDX-License-Identifier: Apache-2.0
"""What every quality benchmark works on: one model, one set of windows, written to a folder.

    python benchmarks/workspace.py FOLDER [--calibration builtin|FILE] [--text NAME=FILE ...]
        [--count 20]

makes ``FOLDER/model`` (the demo model, decoded to float32, in the format of Hugging Face),
``FOLDER/windows.safetensors`` (``calibration`` and one ``evaluation.NAME`` for each text, int64
token ids ``[windows, length]``) and ``FOLDER/sentences.json`` (for sentence embeddings). Peers read
them in environments of their own, so that everything is measured on the same tokens.

The evaluation texts are prose that no calibration text holds: addresses to the nation
(``addresses``) and a novel (``novel``), both from packages of the npm registry: 20 windows of each,
or ``--count``, where what is compared differs by less than so few can tell (8 bits). Calibration is
the text that modewright takes by default.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
import urllib.request
from pathlib import Path

from safetensors.torch import save_file

from modewright.calibration.text import load_documents, make_windows
from modewright.integrations.transformers import encode, load_model, save_assets

CALIBRATION = {"count": 64, "length": 512}
EVALUATION = 20  # windows of each text
SENTENCES = 500
TEXTS = {
    # name: (npm package, which files of it)
    "addresses": ("datasets-sotu", r"package/data/(19[6-9]|20)\d\d?_?.*\.txt"),
    "novel": ("datasets-moby-dick", r"package/data/chapter_\d+\.json"),
}
REGISTRY = "https://registry.npmjs.org/@stdlib/{package}/-/{package}-0.2.3.tgz"


def text_of(name: str) -> str:
    """Fetch one of :data:`TEXTS` from the npm registry."""
    package, pattern = TEXTS[name]
    with urllib.request.urlopen(REGISTRY.format(package=package)) as answer:  # noqa: S310
        content = io.BytesIO(answer.read())
    parts = []
    with tarfile.open(fileobj=content, mode="r:gz") as archive:
        for member in sorted(archive.getnames()):
            file = archive.extractfile(member) if re.fullmatch(pattern, member) else None
            if file is not None:
                text = file.read().decode("utf-8")
                parts.append(json.loads(text)["text"] if member.endswith(".json") else text)
    return "\n\n".join(parts)


def sentences_of(text: str) -> list[str]:
    """Return sentences of 5 to 40 words, spread over the text."""
    flat = re.sub(r"\s+", " ", text)
    found = [s for s in re.split(r"(?<=[.!?]) ", flat) if 5 <= len(s.split()) <= 40]
    step = max(1, len(found) // SENTENCES)
    return found[::step][:SENTENCES]


def prepare(folder: Path, calibration: str, texts: dict[str, Path], count: int) -> None:
    """Write the workspace."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_model("demo:smollm2")
    encoder = encode(loaded.tokenizer)
    loaded.model.save_pretrained(folder / "model")
    save_assets(loaded.model, loaded.tokenizer, folder / "model")
    documents = load_documents(calibration, "calibration")
    windows = {"calibration": make_windows(documents, encoder, **CALIBRATION)}
    contents = {name: path.read_text(encoding="utf-8") for name, path in texts.items()}
    contents = contents or {name: text_of(name) for name in TEXTS}
    for name, text in contents.items():
        windows[f"evaluation.{name}"] = make_windows([text], encoder, count=count, length=512)
    save_file(windows, folder / "windows.safetensors")
    sentences = [s for text in contents.values() for s in sentences_of(text)[: SENTENCES // 2]]
    calibration_sentences = sentences_of(" ".join(documents))[:256]
    (folder / "sentences.json").write_text(
        json.dumps({"calibration": calibration_sentences, "evaluation": sentences})
    )


def main() -> None:
    """Read the command line and write the workspace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument(
        "--count", type=int, default=EVALUATION, help="evaluation windows of a text"
    )
    options = parser.parse_args()
    texts = {name: Path(path) for name, path in (t.split("=", 1) for t in options.text)}
    prepare(options.folder, options.calibration, texts, options.count)


if __name__ == "__main__":
    main()
