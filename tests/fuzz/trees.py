"""Structured damage of formats that hold a tree: JSON, YAML, and the dicts that torch saves.

A change picks one node of the tree (a mapping's or list's entry) and replaces, removes or renames it. The names of
`TREE` are the mutations' names.
"""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from .mutations import Change, Skipped

Path = tuple[Any, ...]
NodeChange = Callable[[Any, Path, random.Random], Any]
_DEEP = "\u2402deep\u2403"  # stands for a deep nest until the tree is text
_LEVELS = 5000


def nodes(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every entry below the root, depth first; of a long list only a few, which are enough to stand for it."""
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
        items = items if len(items) <= 6 else items[:3] + items[-3:]
    for key, value in items:
        yield (*path, key), value
        yield from nodes(value, (*path, key))


def put(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value at `path`."""
    if not path:
        return value
    if isinstance(tree, tuple):
        return tuple(put(list(tree), path, value))
    tree[path[0]] = put(tree[path[0]], path[1:], value)
    return tree


def _null(value: Any, path: Path, rng: random.Random) -> Any:
    return None


def _other_type(value: Any, path: Path, rng: random.Random) -> Any:
    options = ([], {}, "text", [value], {"a": value}, "1", True, 7, 0.5, [1, "a"], [[value]])
    return rng.choice([option for option in options if type(option) is not type(value)])


def _unfinite(value: Any, path: Path, rng: random.Random) -> Any:
    return rng.choice((float("nan"), float("inf"), float("-inf")))


def _huge(value: Any, path: Path, rng: random.Random) -> Any:
    return rng.choice((1e30, 2**70, -(2**70), 1e300, -1, 0, 2**31, 10**400, -0.5))


def _long(value: Any, path: Path, rng: random.Random) -> Any:
    return rng.choice(("x" * 400, "a\0b", "../" * 9 + "etc/passwd", "/" + "y/" * 300, "", "x\ny", "\ud800", "²", "~"))


def _deep(value: Any, path: Path, rng: random.Random) -> Any:
    return _DEEP


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHANGES: Mapping[str, tuple[NodeChange, Callable[[Any], bool]]] = {
    "null": (_null, lambda value: value is not None),
    "other type": (_other_type, lambda value: True),
    "not finite": (_unfinite, _is_number),
    "huge number": (_huge, _is_number),
    "long name": (_long, lambda value: isinstance(value, str)),
    "deep": (_deep, lambda value: True),
}


def changed(tree: Any, name: str, rng: random.Random) -> Any:
    """A copy of the tree with one change of that name."""
    tree = copy.deepcopy(tree)
    found = list(nodes(tree))
    if name == "missing key" or name == "renamed key":
        keys = [path for path, _ in found if isinstance(path[-1], str)]
        path = _one(keys, rng)
        parent = _at(tree, path[:-1])
        value = parent.pop(path[-1])
        if name == "renamed key":
            letter = rng.randrange(len(path[-1])) if path[-1] else 0
            parent[path[-1][:letter] + rng.choice("xyz_ é") + path[-1][letter + 1 :]] = value
        return tree
    if name == "another root":
        return rng.choice((None, [], {}, [tree], 3, "text", True, {"a": tree}, [[]], float("nan")))
    change, fits = _CHANGES[name]
    path = _one([path for path, value in found if fits(value)], rng)
    return put(tree, path, change(_at(tree, path), path, rng))


def _one(paths: list[Path], rng: random.Random) -> Path:
    if not paths:
        raise Skipped("no such value in the file")
    return rng.choice(paths)


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


NAMES = (*_CHANGES, "missing key", "renamed key", "another root")


def _table(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> dict[str, Change]:
    def change_of(name: str) -> Change:
        return lambda data, rng: encode(changed(decode(data), name, rng))

    return {name: change_of(name) for name in NAMES}


# ---------------------------------------------------------------------------------------------- JSON, lines, YAML


def _to_json(tree: Any) -> bytes:
    text = json.dumps(tree, indent=1)
    return _nested(text, json.dumps(_DEEP), "[" * _LEVELS + "]" * _LEVELS).encode("utf-8", "surrogatepass")


def _to_yaml(tree: Any) -> bytes:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    for quoted in (f'"{_DEEP}"', f"'{_DEEP}'", yaml.safe_dump(_DEEP).split("\n")[0]):
        text = _nested(text, quoted, "[" * _LEVELS + "]" * _LEVELS)
    return text.encode("utf-8", "surrogatepass")


def _nested(text: str, mark: str, nest: str) -> str:
    return text.replace(mark, nest)


def _repeated_line(data: bytes, rng: random.Random) -> bytes:
    """One line of a text twice in a row: a key given twice, a record twice."""
    lines = data.split(b"\n")
    line = rng.randrange(len(lines))
    return b"\n".join([*lines[: line + 1], *lines[line:]])


JSON: Mapping[str, Change] = {**_table(json.loads, _to_json), "repeated line": _repeated_line}
YAML: Mapping[str, Change] = {**_table(yaml.safe_load, _to_yaml), "repeated line": _repeated_line}


def _line_change(name: str) -> Change:
    def change(data: bytes, rng: random.Random) -> bytes:
        lines = data.splitlines()
        row = rng.randrange(len(lines))
        lines[row] = _to_json(changed(json.loads(lines[row]), name, rng)).replace(b"\n", b"")
        return b"\n".join(lines) + b"\n"

    return change


JSON_LINES: Mapping[str, Change] = {
    **{name: _line_change(name) for name in NAMES},
    "repeated line": _repeated_line,
}


# ---------------------------------------------------------------------------------------------- torch's files


def _tensor_dtype(value: Tensor, rng: random.Random) -> Any:
    return value.to(rng.choice((torch.int64, torch.complex64, torch.bool, torch.uint8, torch.float64)))


def _tensor_unfinite(value: Tensor, rng: random.Random) -> Any:
    value = value.clone().reshape(-1)
    value[rng.randrange(len(value))] = rng.choice((float("nan"), float("inf"), -float("inf")))
    return value


def _tensor_shape(value: Tensor, rng: random.Random) -> Any:
    return rng.choice((value[:-1], value[None], torch.cat([value, value]), value.reshape(-1)[:0], value.reshape(-1)))


def _tensor_transposed(value: Tensor, rng: random.Random) -> Any:
    if value.ndim < 2:
        raise Skipped("one dimension only")
    return value.transpose(0, -1).contiguous()


def _tensor_listed(value: Tensor, rng: random.Random) -> Any:
    return rng.choice((value.reshape(-1)[:3].tolist(), "tensor", None, 1.0))


_TENSOR_CHANGES: Mapping[str, Callable[[Tensor, random.Random], Any]] = {
    "tensor dtype": _tensor_dtype,
    "tensor not finite": lambda value, rng: _tensor_unfinite(value, rng).reshape(value.shape),
    "tensor shape": _tensor_shape,
    "tensor transposed": _tensor_transposed,
    "tensor replaced": _tensor_listed,
}


def change_tensor(tree: Any, name: str, rng: random.Random) -> Any:
    """A copy of the tree with one of its tensors changed."""
    fits = torch.is_floating_point if name == "tensor not finite" else lambda value: True
    wanted = [p for p, v in nodes(tree) if isinstance(v, Tensor) and v.ndim > 0 and v.numel() > 0 and fits(v)]
    if name == "tensor transposed":
        wanted = [path for path in wanted if _at(tree, path).ndim > 1]
    path = _one(wanted, rng)
    return put(copy.deepcopy(tree), path, _TENSOR_CHANGES[name](_at(tree, path), rng))


def torch_table(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> dict[str, Change]:
    """The structured mutations of a format that holds tensors."""

    def tensor(name: str) -> Change:
        return lambda data, rng: encode(change_tensor(decode(data), name, rng))

    return {**_table(decode, encode), **{name: tensor(name) for name in _TENSOR_CHANGES}}


def from_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def to_torch(tree: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(_nest(tree), sink)
    return sink.getvalue()


def _nest(tree: Any) -> Any:
    """The mark of a deep nest as lists within lists; pickle itself goes no deeper than this."""
    if isinstance(tree, dict):
        return {key: _nest(value) for key, value in tree.items()}
    if isinstance(tree, str) and tree == _DEEP:
        nest: list[Any] = []
        for _ in range(200):
            nest = [nest]
        return nest
    return tree


TORCH: Mapping[str, Change] = torch_table(from_torch, to_torch)
