"""How a config is read, written and named: the one decoder, for YAML files and the config inside a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from slidr.config.marks import as_used
from slidr.config.paths import user_path
from slidr.config.rules import check
from slidr.config.schema import ADDED, Config, ConfigError
from slidr.config.yaml_text import read_yaml, write_yaml
from slidr.urls import redact_url

_MOST_BYTES = 2**20  # of a config file; a real one has some thousand


def decode(raw: dict[str, Any], source: str = "config") -> Config:
    """The checked config that a plain dict describes.

    Missing keys take their defaults. Raises `ConfigError` naming `source` and every offending key.
    """
    from pydantic import ValidationError  # here: a Config that is built in Python needs no pydantic

    _refuse_unknown(raw, Config, (), source)
    try:
        # As JSON, strictly: lists may become tuples and integers floats, but no text a number.
        config = _adapter().validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        lines = [
            f"{source}: {'.'.join(str(part) for part in e['loc'])}: {e['msg']}, got {e.get('input')!r}"
            for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None
    config = with_used_paths(config, source)
    check(config, source)
    return config


def with_used_paths(config: Config, source: str = "config") -> Config:
    """The config with every path as it is used (see `slidr.config.paths`). Raises `ConfigError` naming the key."""
    try:
        return as_used(config)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def load(path: str | Path) -> Config:
    """The config in a YAML file."""
    try:
        path = user_path(path)
        text = _text_of(path)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file; pass a YAML file such as configs/demo.yaml") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}); pass a file such as configs/demo.yaml") from None
    return parse(text, path)


def parse(text: str, source: str = "config") -> Config:
    """The config in a YAML text; `source` names it in errors."""
    raw = read_yaml(text, source)
    if not isinstance(raw, dict):
        found = "nothing: the file is empty" if raw is None else type(raw).__name__
        raise ConfigError(f"{source}: expected a mapping of sections such as data: and optim:, got {found}")
    return decode(raw, source)


def to_dict(config: Any) -> dict[str, Any]:
    """A config (or one section) as plain dicts, lists and scalars; the inverse of `decode`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def public_dict(config: Config) -> dict[str, Any]:
    """`to_dict` for files that others may see: URLs lose user names, passwords and queries."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(inner) for key, inner in value.items()}
        if isinstance(value, str) and "://" in value and not value.startswith("sqlite:"):
            return redact_url(value)
        return value

    return public(to_dict(config))


def dump(config: Config) -> str:
    """A config as YAML that `load` reads back to the same value, but for what URLs keep secret."""
    return write_yaml(public_dict(config))


def fingerprint(section: Any, length: int = 10) -> str:
    """A short name for a dataclass's values: equal values, equal names, whatever the field order.

    A key declared with `schema.added` is left out while it has its default. So a new key changes no name that is
    recorded already: superpixel folders, searches, run folders and evaluations stay valid.
    """
    text = json.dumps(_named(section), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _named(value: Any) -> Any:
    """The values that a fingerprint covers, as plain dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {field.name: _named(inner) for field, inner in fields if not _is_added_default(field, inner)}
    return [_named(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_added_default(field: dataclasses.Field[Any], value: Any) -> bool:
    return bool(field.metadata.get(ADDED)) and value == field.default


def _text_of(path: str) -> str:
    """A file's text. A pipe is read, too (a shell's `<(...)`), but nothing waits for a FIFO that nobody writes."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it holds more than {_MOST_BYTES} bytes")
    return data.decode()


def _refuse_unknown(raw: Any, schema: type, path: tuple[str, ...], source: str) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: {'.'.join(path)}: expected a mapping, got {raw!r}")
    types = get_type_hints(schema)
    for key, value in raw.items():
        dotted = ".".join((*path, str(key)))
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join((*path, near[0]))}?" if near else f"known here: {', '.join(types)}"
            raise ConfigError(f"{source}: unknown key {dotted}; {hint}")
        if dataclasses.is_dataclass(types[key]):
            _refuse_unknown(value, types[key], (*path, key), source)


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Config)
