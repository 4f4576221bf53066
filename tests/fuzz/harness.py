"""Damages a file, gives it to the product's reader, and says how that ended.

A case is (input, mutation, seed) and depends on nothing else: `PYTHONPATH=.:tests python -m fuzz "INPUT" "MUTATION"
SEED` repeats one. It ends well as

same        the value of the undamaged file, bit for bit
as written  another value, which is what the damaged file says when it is read by other means: a file without a
            checksum cannot say that another number stood there
fell back   what the product promises instead: an earlier checkpoint, a file made again, the lines that are whole
refused     an error of the project's own that names the damaged file

and ill as anything else: a foreign exception, another value, an error that names another file, a crash, no end, or more
memory than `sandbox` allows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import mutations
from .mutations import BYTES, PLACES, Change, Skipped

GOOD = ("same", "as written", "fell back", "refused")


@dataclass(frozen=True)
class Input:
    """A kind of file that the product reads, and the product's own reader of it.

    Every function works in the current folder. `make` writes the undamaged files, variant 0 or another valid one, and
    must give the same bytes each time; `target` is the file that is damaged. `read` returns a value to compare. `says`
    tells whether a value is what the damaged file says when it is read by other means than the product's; `instead`,
    whether it is what the product promises in place of a file that cannot be read. `also` are names that an error may
    give instead of the target's.
    """

    name: str
    make: Callable[[int], None]
    target: str
    read: Callable[[], Any]
    changes: Mapping[str, Change] = dataclasses.field(default_factory=dict)
    says: Callable[[Any], bool] = lambda value: False
    instead: Callable[[Any], bool] = lambda value: False
    also: tuple[str, ...] = ()
    names: Callable[[str], bool] | None = None  # whether an error's text names the input, where it is not a file
    without: tuple[str, ...] = ()  # mutations that are not damage here
    slow: bool = False  # seconds a case: fewer of them

    @property
    def mutations(self) -> tuple[str, ...]:
        return tuple(name for name in (*BYTES, *PLACES, *OTHERS, *self.changes) if name not in self.without)


OTHERS = ("another of its kind", "another kind")


@dataclass(frozen=True, order=True)
class Case:
    input: str
    mutation: str
    seed: int

    def __str__(self) -> str:
        return f'PYTHONPATH=.:tests python -m fuzz "{self.input}" "{self.mutation}" {self.seed}'


@dataclass(frozen=True)
class Outcome:
    """How a case ended; `detail` says what was seen, `where` the line of the product that a foreign error came from."""

    kind: str  # one of GOOD, "skipped", or what went wrong
    detail: str = ""
    where: str = ""

    @property
    def good(self) -> bool:
        return self.kind in GOOD or self.kind == "skipped"


# ---------------------------------------------------------------------------------------------- values


def digest(value: Any) -> str:
    """A fingerprint of plain values, arrays, tensors and dataclasses: equal ones, bit for bit, equal fingerprints."""
    sha = hashlib.sha256()
    for part in _parts(value):
        sha.update(part)
    return sha.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"array {value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield repr(key).encode("utf-8", "surrogatepass")
            yield from _parts(value[key])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------- files


def build(inputs: Iterable[Input], store: Path) -> None:
    """Writes both variants of every input's undamaged files below `store`."""
    for each in inputs:
        for variant in (0, 1):
            folder = folder_of(store, each.name, variant)
            folder.mkdir(parents=True)
            with inside(folder):
                each.make(variant)


def folder_of(store: Path, name: str, variant: int) -> Path:
    return store / f"{name.replace(' ', '-').replace('/', '_')}.{variant}"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def damage(case: Case, inputs: Mapping[str, Input], store: Path, folder: Path) -> None:
    """Damages the target of a case's input below `folder`. Raises `Skipped` where the mutation changes nothing."""
    each, rng = inputs[case.input], random.Random(f"{case.input}/{case.mutation}/{case.seed}")
    path = folder / each.target
    if case.mutation in PLACES:
        PLACES[case.mutation](path, rng)
    elif case.mutation == "another of its kind":
        mutations.replace_file(path, folder_of(store, each.name, 1) / each.target)
    elif case.mutation == "another kind":
        other = rng.choice([inputs[name] for name in sorted(inputs) if name != each.name])
        mutations.replace_file(path, folder_of(store, other.name, 0) / other.target)
    else:
        data = path.read_bytes()
        change = BYTES.get(case.mutation) or each.changes[case.mutation]
        changed = change(data, rng)
        if changed == data:
            raise Skipped("nothing changed")
        path.write_bytes(changed)


# ---------------------------------------------------------------------------------------------- one case


class Runner:
    """Runs cases in this process. `expected`: digests of the undamaged values, by input and variant."""

    def __init__(self, inputs: Mapping[str, Input], store: Path) -> None:
        self.inputs, self.store = inputs, store
        self.expected: dict[tuple[str, int], str] = {}

    def intact(self, name: str, variant: int = 0) -> str:
        if (name, variant) not in self.expected:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "case")
                shutil.copytree(folder_of(self.store, name, variant), folder, symlinks=True)
                with inside(folder):
                    _forget_caches()
                    try:
                        self.expected[name, variant] = digest(self.inputs[name].read())
                    except ValueError:
                        if variant == 0:
                            raise
                        self.expected[name, variant] = "refused where the first is expected"
        return self.expected[name, variant]

    def run(self, case: Case) -> Outcome:
        each, expected = self.inputs[case.input], self.intact(case.input)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "case")
            shutil.copytree(folder_of(self.store, each.name, 0), folder, symlinks=True)
            try:
                damage(case, self.inputs, self.store, folder)
            except Skipped as reason:
                return Outcome("skipped", str(reason))
            with inside(folder):
                _forget_caches()
                try:
                    value = each.read()
                except BaseException as error:
                    return _refusal(error, each)
                seen = digest(value)
                if seen == expected:
                    return Outcome("same")
                if _holds(each.instead, value):
                    return Outcome("fell back")
                if case.mutation == "another of its kind" and seen == self.intact(each.name, 1):
                    return Outcome("as written", "the other file's value")
                if _holds(each.says, value):
                    return Outcome("as written")
                return Outcome("wrong result", short(value))


def _forget_caches() -> None:
    """Empties the product's caches: every case has the same paths, and other files at them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("slidr."):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    """The check's answer; false where it cannot read the file."""
    try:
        return bool(check(value))
    except Exception:
        return False


def _refusal(error: BaseException, each: Input) -> Outcome:
    if isinstance(error, KeyboardInterrupt):
        raise error
    text = str(error)
    if not type(error).__module__.startswith("slidr."):
        return Outcome("foreign error", f"{type(error).__name__}: {short(text)}", _origin(error))
    named = each.names(text) if each.names is not None else any(name in text for name in (each.target, *each.also))
    if not named:
        return Outcome("names no file", f"{type(error).__name__}: {short(text)}", _origin(error))
    if len(text) > 3000 or (each.names is None and ("\x00" in text or "\x1b" in text)):
        return Outcome("unreadable message", f"{len(text)} characters: {text[:80]!r}", _origin(error))
    return Outcome("refused", f"{type(error).__name__}: {short(text)}")


def _origin(error: BaseException) -> str:
    """The last line of the product that the error passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/slidr/" in frame.filename]
    if not frames:
        return ""
    name = frames[-1].filename.rpartition("/slidr/")[2]
    return f"slidr/{name}:{frames[-1].name}"


def short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
