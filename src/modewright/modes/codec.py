# SPDX-License-Identifier: Apache-2.0
"""Plain data with tensors in it, and its two halves: JSON text and named tensors.

Mode metadata and the state of a search are "JSON values and tensors". Written to a file, tensors go
to safetensors and leave ``{"$tensor": name}`` in their place. No other type is accepted, so that
reading a file can never need code to rebuild an object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

TENSOR_KEY = "$tensor"
MAX_DEPTH = 64
_MAX_FILE_DEPTH = MAX_DEPTH + 16  # recorded data and what is written around it


def canonical(value: Any, where: str, *, error: type[Exception], _depth: int = 0) -> Any:
    """Return a copy of ``value`` made of dicts, lists, JSON scalars and detached tensors only.

    Tuples become lists, as they would in JSON; containers are copied, tensors are not.

    Args:
        value: The data to check.
        where: Name of ``value`` for messages, such as ``"metadata"``.
        error: The exception class to raise.

    Raises:
        error: A value has another type, a float is not finite, a key is no string.
    """
    if _depth > MAX_DEPTH:
        raise error(f"{where} is nested more than {MAX_DEPTH} levels deep.")
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise error(f"{where} is {value!r}, which JSON cannot hold. Use None or a string.")
        return float(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            if not isinstance(key, str) or key.startswith("$"):
                raise error(
                    f"{where} has the key {key!r}: keys must be strings that do not start with '$'."
                )
            result[str(key)] = canonical(item, f"{where}.{key}", error=error, _depth=_depth + 1)
        return result
    if isinstance(value, (list, tuple)):
        return [
            canonical(item, f"{where}[{i}]", error=error, _depth=_depth + 1)
            for i, item in enumerate(value)
        ]
    if isinstance(value, (int, str)):  # IntEnum, str-Enum and their like: keep the plain value
        return int(value) if isinstance(value, int) else str.__str__(value)
    raise error(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, but only JSON values "
        "(dict, list, str, int, float, bool, None) and tensors can be recorded. Convert it to one "
        "of these, or pass it through mode_kwargs, which are not recorded."
    )


def copy_data(value: Any) -> Any:
    """Return a deep copy of canonical data; tensors are cloned."""
    if isinstance(value, dict):
        return {k: copy_data(v) for k, v in value.items()}
    if isinstance(value, list):
        return [copy_data(v) for v in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def split_tensors(value: Any, prefix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return canonical data with placeholders for its tensors, and the tensors by name."""
    tensors: dict[str, torch.Tensor] = {}

    def visit(item: Any, path: str) -> Any:
        if isinstance(item, torch.Tensor):
            tensors[path] = item
            return {TENSOR_KEY: path}
        if isinstance(item, dict):
            return {k: visit(v, f"{path}/{k}") for k, v in item.items()}
        if isinstance(item, list):
            return [visit(v, f"{path}/{i}") for i, v in enumerate(item)]
        return item

    return visit(value, prefix), tensors


def join_tensors(
    value: Any, tensors: Mapping[str, torch.Tensor], where: str, *, error: type[Exception]
) -> Any:
    """Put tensors back in the place of their placeholders; the inverse of :func:`split_tensors`.

    Raises:
        error: A placeholder is malformed or names a tensor that is missing.
    """
    if isinstance(value, dict):
        if TENSOR_KEY in value:
            name = value[TENSOR_KEY]
            if len(value) != 1 or not isinstance(name, str) or name not in tensors:
                raise error(f"{where} refers to the tensor {name!r}, which is missing.")
            return tensors[name]
        return {k: join_tensors(v, tensors, f"{where}.{k}", error=error) for k, v in value.items()}
    if isinstance(value, list):
        return [join_tensors(v, tensors, f"{where}[{i}]", error=error) for i, v in enumerate(value)]
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        if not level:
            return False
        nested = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))
        ]
        level = [item for items in nested for item in items]
    return bool(level)


def dumps(value: Any) -> str:
    """Return canonical JSON text: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def loads(text: str | bytes, where: str, *, error: type[Exception]) -> Any:
    """Parse JSON strictly.

    Raises:
        error: It is no JSON, nested too deep, or holds NaN, an infinite number or a key twice.
    """

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"{digits} is too large a number")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return result

    try:
        value = json.loads(
            text,
            parse_constant=refuse_constant,
            parse_float=finite,
            object_pairs_hook=unique,
        )
        if _deeper_than(value, _MAX_FILE_DEPTH):
            raise ValueError(f"it is nested more than {_MAX_FILE_DEPTH} levels deep")
        return value
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not valid JSON: {problem}.") from problem
