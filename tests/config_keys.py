"""Every key of the config's schema, found by its types: for tests that hold for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from slidr.config import Config


@dataclasses.dataclass(frozen=True)
class Key:
    """A key's dotted name, its section's class, and its bare type."""

    name: str
    section: type
    hint: Any

    @property
    def types(self) -> set[type]:
        """The scalar types in the key's type."""
        return set(_scalars(self.hint))

    def raw(self, value: Any) -> dict[str, Any]:
        """A config's plain dict in which the key, or one item of a fixed-size key, has a value."""
        lengths = [len(get_args(option)) for option in (self.hint, *get_args(self.hint)) if _is_tuple(option)]
        scalar_too = any(option in (int, float, str) for option in (self.hint, *get_args(self.hint)))
        if lengths and not (scalar_too and not _is_tuple(self.hint)):
            default = self.default()
            value = [*list(default)[:-1], value] if default else [value]
        for part in reversed(self.name.split(".")):
            value = {part: value}
        return value

    def default(self) -> Any:
        found: Any = Config()
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


def all_keys(section: type = Config, prefix: str = "") -> Iterator[Key]:
    for name, hint in get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from all_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield Key(prefix + name, section, hint)


def _is_tuple(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is tuple


def _scalars(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for inner in get_args(hint):
        yield from _scalars(inner)


NUMBERS = [key for key in all_keys() if key.types & {int, float}]
TEXTS = [key for key in all_keys() if str in key.types]
