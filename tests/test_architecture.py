# SPDX-License-Identifier: Apache-2.0
"""Rules that hold for every source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import modewright
from modewright import errors

SOURCE = Path(modewright.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
OWN_ERRORS = {name for name in vars(errors) if name.endswith("Error")}
# Protocols that prescribe the class: attribute access, abstract methods, the command line.
PROTOCOL_ERRORS = {
    "AttributeError",
    "NotImplementedError",
    "StopIteration",
    "SystemExit",
    "UsageError",
}
# pydantic validators and JSON hooks must raise ValueError; a caller of theirs turns it into one of
# the package's own.
VALUE_ERRORS_IN = {"_check", "_validate", "_consistent", "refuse_constant", "finite", "unique"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_sources_are_found() -> None:
    assert len(FILES) > 20


@each_file
def test_file_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@each_file
def test_functions_are_short(file: Path) -> None:
    long = {
        f.name: length
        for f in functions(parse(file))
        if (length := (f.end_lineno or 0) - f.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


@each_file
def test_file_begins_with_its_licence(file: Path) -> None:
    first = file.read_text(encoding="utf-8").partition("\n")[0]

    assert first == "# SPDX-License-Identifier: Apache-2.0"


@each_file
def test_file_has_no_assert(file: Path) -> None:
    lines = [node.lineno for node in ast.walk(parse(file)) if isinstance(node, ast.Assert)]

    assert lines == []


def raised(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and class name of every ``raise Class(...)`` or ``raise Class``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
            if name[:1].isupper():
                yield node.lineno, name


def decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for decorator in function.decorator_list
        for node in ast.walk(decorator)
        if isinstance(node, (ast.Name, ast.Attribute))
    }


def allowed_value_errors(tree: ast.Module) -> set[int]:
    """Lines inside pydantic validators, JSON hooks, and ``try`` blocks that catch ValueError."""
    lines: set[int] = set()
    for function in functions(tree):
        validators = {"field_validator", "model_validator", "validator"}
        if function.name in VALUE_ERRORS_IN or decorators(function) & validators:
            lines.update(line for line, _ in raised(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(
            "ValueError" in ast.dump(handler.type) for handler in node.handlers if handler.type
        ):
            for statement in node.body:
                lines.update(line for line, _ in raised(statement))
    return lines


@each_file
def test_every_error_raised_is_one_of_the_package(file: Path) -> None:
    tree = parse(file)
    values = allowed_value_errors(tree)
    foreign = [
        (line, name)
        for line, name in raised(tree)
        if name not in OWN_ERRORS | PROTOCOL_ERRORS
        and not (name == "ValueError" and line in values)
    ]
    assert foreign == []


@each_file
def test_file_can_run_no_code_from_data(file: Path) -> None:
    found = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] * ((node.module or "").split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in FORBIDDEN_CALLS | {"torch.load", "torch.save"})
            found += [name] * (name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"})
    assert found == []
