"""YAML in and out: YAML 1.2's floats, no key twice, and no text that unfolds without end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from slidr.config.schema import ConfigError

if TYPE_CHECKING:  # loaded where YAML is read or written: a training step needs none
    import yaml

_MOST_VALUES = 100_000  # of a config, its aliases unfolded; a real one has some hundred
_DEEPEST = 50  # levels; a real one has four


def read_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises `ConfigError` for what is not YAML, for a key that is given twice in a mapping (with both lines), and for
    aliases that unfold to an enormous value.
    """
    import yaml

    try:
        loader = _classes()[0](text)  # a SafeLoader
        root = loader.get_single_node()
        if root is None:
            return None
        _require_single_keys(root, source)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply for a config") from None
    except ValueError as error:  # a date that does not exist, an integer of thousands of digits; ours are passed on
        raise error if isinstance(error, ConfigError) else ConfigError(f"{source}: {error}") from None


def write_yaml(value: Any) -> str:
    """Plain dicts, lists and scalars as YAML that `read_yaml` reads back to the same value."""
    import yaml

    return yaml.dump(value, Dumper=_classes()[1], sort_keys=False)


def _require_single_keys(root: yaml.Node, source: str) -> None:
    import yaml

    problems: list[str] = []
    for count, (path, node) in enumerate(_nodes(root)):
        if count > _MOST_VALUES or len(path) > _DEEPEST:
            raise ConfigError(
                f"{source}: unfolds to more than {_MOST_VALUES} values or {_DEEPEST} levels; write it without aliases"
            )
        if not isinstance(node, yaml.MappingNode):
            continue
        line_of: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in line_of:
                lines = f"in lines {line_of[name]} and {line}" if line_of[name] != line else f"in line {line}"
                problems.append(f"{source}: {'.'.join((*path, key.value))}: is given twice, {lines}; keep one of them")
            line_of.setdefault(name, line)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _nodes(root: yaml.Node) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    """Every node with its path, in order; one behind an alias as often as the alias is used."""
    import yaml

    todo: list[tuple[tuple[str, ...], yaml.Node]] = [((), root)]
    while todo:
        path, node = todo.pop()
        yield path, node
        if isinstance(node, yaml.MappingNode):
            inner = [(key.value if isinstance(key, yaml.ScalarNode) else "?", value) for key, value in node.value]
            todo += [((*path, name), value) for name, value in reversed(inner)]
        elif isinstance(node, yaml.SequenceNode):
            todo += [((*path, "-"), value) for value in reversed(node.value)]


_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


@cache
def _classes() -> tuple[Any, Any]:
    """A safe loader that reads YAML 1.2's floats (PyYAML alone takes 1e-4 for text), and a dumper that fits it."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    return Loader, Dumper
