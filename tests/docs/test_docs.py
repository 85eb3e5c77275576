# SPDX-License-Identifier: Apache-2.0
"""The pages are true: examples run and print what they show, commands parse, links lead somewhere.

In a page, a ``python`` block is run, all blocks of a page in one namespace and in order. A ``text``
block right after it is what it prints; line breaks are free. Lines of a ``console`` block that
begin with ``$ modewright`` must be commands that parse; those that only list something are run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch

import modewright
from modewright.cli import application, main
from modewright.modes.registry import ModeRegistry

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
LISTING = {"modes", "recipes"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Return language, content and first line of every fenced block."""
    text = page.read_text(encoding="utf-8")
    found = [(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in BLOCK.finditer(text)]
    assert text.count("\n```") + text.startswith("```") == 2 * len(found), "an unclosed block"
    return found


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture
def _clean_registry() -> Iterator[None]:
    """Take the modes that an example registers out again."""
    before = set(modewright.default_registry)
    yield
    for name in set(modewright.default_registry) - before:
        modewright.default_registry.remove(name)


@pages
@pytest.mark.usefixtures("_clean_registry")
def test_examples_run_and_print_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(page)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index, (language, code, line) in enumerate(found):
            if language != "python":
                continue
            compiled = compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compiled, namespace)
            following = found[index + 1] if index + 1 < len(found) else ("", "", 0)
            if following[0] == "text":
                assert printed.getvalue().split() == following[1].split(), f"{page}:{following[2]}"


@pages
def test_commands_parse_and_listing_ones_run(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for language, content, line in blocks(page):
        if language != "console":
            continue
        for shown in content.replace("\\\n", " ").splitlines():
            words = shlex.split(shown, comments=True)
            if words[:2] != ["$", "modewright"]:
                continue
            where = f"{page}:{line}: {shown}"
            verb = next((word for word in words[2:] if not word.startswith("-")), None)
            if verb is None:
                continue
            rest = words[words.index(verb) + 1 :]
            context = application.make_context("modewright", [*words[2 : words.index(verb)], verb])
            _, command, _ = application.resolve_command(context, [verb])
            assert command is not None, where
            with contextlib.suppress(click.exceptions.Exit):
                command.make_context(verb, list(rest), parent=context)
            if verb in LISTING and not any(word.endswith(".yaml") for word in rest):
                with pytest.raises(SystemExit) as ended:
                    main([verb, *rest])
                assert ended.value.code == 0, f"{where}\n{capsys.readouterr().err}"


@pages
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))

    assert set(re.findall(r"(?:^\$ |`)make ([\w-]+)", page.read_text("utf-8"), re.M)) <= targets


@pages
def test_recipes_that_are_shown_are_valid(page: Path, tmp_path: Path) -> None:
    for language, content, _ in blocks(page):
        if language == "yaml":
            path = tmp_path / "shown.yaml"
            path.write_text(content)
            assert modewright.load_recipe(path).steps


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that headings get."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_public_name_is_on_the_page_of_the_python_api() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")

    for name in modewright.__all__:
        assert re.search(rf"`{re.escape(name)}(\(.*?\))?`", text), name


def test_every_error_is_on_the_page_of_the_python_api() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")

    for name, value in vars(modewright.errors).items():
        if isinstance(value, type) and issubclass(value, modewright.errors.ModewrightError):
            assert f"`{name}`" in text, name


def test_every_page_of_docs_is_in_its_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")

    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"({name})" in index, name


@pytest.fixture(scope="module")
def make_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pages
def test_generated_tables_are_current(page: Path, make_tables: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")

    assert make_tables.renewed(text) == text, "run: python docs/make_tables.py"
    assert text.count("<!-- table: ") == text.count("<!-- /table -->")
    assert len(make_tables.TABLE.findall(text)) == text.count("<!-- /table -->")


def test_the_documented_mode_is_found_through_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install the page's module as a package would be, with the page's entry points."""
    page = ROOT / "docs" / "add-a-mode.md"
    code = "\n".join(
        code for language, code, _ in blocks(page) if language == "python" and "# acme_" in code
    )
    declared = next(code for language, code, _ in blocks(page) if language == "toml")
    points = re.findall(r'^(\w+) = "(acme_[\w.:]+)"$', declared, re.MULTILINE)
    assert len(points) == 3
    (tmp_path / "acme_modes.py").write_text(code)
    info = tmp_path / "acme_modes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-modes\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {target}" for name, target in points)
    (info / "entry_points.txt").write_text(f"[modewright.modes]\n{lines}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    try:
        registry = ModeRegistry(entry_point_group="modewright.modes")

        assert {name for name, _ in points} <= set(registry)
        assert "acme_modes" not in sys.modules  # listed without being imported
        for name, _ in points:
            assert registry[name].name == name
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        modewright.apply_mode(model, ("acme_low_rank", {"rank": 2}), registry=registry)
        assert modewright.last_mode(model) == "acme_low_rank"
    finally:
        sys.modules.pop("acme_modes", None)
