"""What the schema says about a key besides its type: the range of a number, and what a text is.

The marks are metadata of `typing.Annotated`. The functions here walk a whole section by its types, so a rule written
once holds for every key, for YAML, the command line, trials and checkpoints alike.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from slidr.config.paths import user_path, user_uri

T = TypeVar("T")
INT64 = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """The range of a number: from `least` to `most`, or, without the bound itself, `above` and `below`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a value lies in the range; nan never does."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = None if self.least is None else f"at least {_shown(self.least)}"
        if self.above is not None:
            low = "a positive number" if self.above == 0 else f"above {_shown(self.above)}"
        high = None if self.most in (None, INT64) else f"at most {_shown(self.most)}"
        high = high if self.below is None else f"below {_shown(self.below)}"
        return " and ".join(part for part in (low, high) if part is not None) or "a finite number"


@dataclass(frozen=True)
class Written:
    """A text that is not used as it is written: `used` turns it into what is used, or raises `ValueError`."""

    used: Callable[[str], str]


# ------------------------------------------------------------------------------------------ types of the schema's keys

Count = Annotated[int, Limits(least=1, most=INT64)]
Natural = Annotated[int, Limits(least=0, most=INT64)]
Seed = Annotated[int, Limits(least=0, most=INT64)]
Positive = Annotated[float, Limits(above=0)]
NotNegative = Annotated[float, Limits(least=0)]
Share = Annotated[float, Limits(least=0, most=1)]  # of a whole
Fraction = Annotated[float, Limits(above=0, most=1)]  # of a whole, not nothing
PathText = Annotated[str, Written(user_path)]  # a file or folder, or a URI of another storage
TrackingText = Annotated[str, Written(user_uri)]  # an MLflow tracking URI


# --------------------------------------------------------------------------------------------------- walks by the types


def hints_of(schema: type) -> dict[str, Any]:
    """The types of a section's keys, with their marks."""
    if schema not in _HINTS:
        _HINTS[schema] = get_type_hints(schema, include_extras=True)
    return _HINTS[schema]


_HINTS: dict[type, dict[str, Any]] = {}


def wrong_numbers(section: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The key and the fault of every number in a section that is not finite or outside its range.

    A number without `Limits` has to be finite, and a whole one has to fit 64 bits. `key` is the section's own.
    """
    for name, hint in hints_of(type(section)).items():
        yield from _wrong(getattr(section, name), hint, f"{key}.{name}" if key else name)


def as_used(section: T, key: str = "") -> T:
    """The section with every `Written` text as it is used. Raises `ValueError` naming the key."""
    changes: dict[str, Any] = {}
    for name, hint in hints_of(type(section)).items():
        value, own = getattr(section, name), f"{key}.{name}" if key else name
        if dataclasses.is_dataclass(value):
            changes[name] = as_used(value, own)
        elif isinstance(value, str):
            for mark in _marks(hint, Written):
                try:
                    changes[name] = value = mark.used(value)
                except ValueError as error:
                    raise ValueError(f"{own}: {error}") from None
    return dataclasses.replace(section, **changes)  # type: ignore[type-var]


def _wrong(value: Any, hint: Any, key: str) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value):
        yield from wrong_numbers(value, key)
    elif isinstance(value, tuple | list):
        items = [option for option in _options(hint) if get_origin(option) is tuple]
        of_items = get_args(items[0]) if items else ()
        for place, item in enumerate(value):
            hint_of_item = of_items[min(place, len(of_items) - 1)] if of_items else Any
            # tuple[X, ...] has one X for all
            hint_of_item = of_items[0] if Ellipsis in of_items else hint_of_item
            yield from _wrong(item, hint_of_item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limits = [mark for option in _options(hint) for mark in _marks(option, Limits)] or [Limits()]
        finite = math.isfinite(value) if isinstance(value, float) else abs(value) <= INT64
        if not finite:
            kind = "a finite number" if isinstance(value, float) else "a number that fits 64 bits"
            yield key, f"got {_shown(value)}, expected {kind}" + (f", {limits[0]}" if limits[0] != Limits() else "")
        elif not limits[0].hold(value):
            yield key, f"got {_shown(value)}, expected {limits[0]}"


def _marks(hint: Any, kind: type[T]) -> list[T]:
    """The marks of a kind on a type, or on the members of a union."""
    found = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, kind)]
    for option in _options(hint):
        if option is not hint:
            found += _marks(option, kind)
    return found


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; else the type alone."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(bare) if get_origin(bare) in (Union, types.UnionType) else (hint,)


def _shown(value: float) -> str:
    """A number as a message shows it: a huge one by its size."""
    if isinstance(value, int) and abs(value) > INT64:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)
