"""Ways to damage a file, each a function of a seeded generator, so that a case can be repeated.

Three groups: `BYTES` change the contents of any file, `PLACES` change what is at its path, and the tables of
`structured` change the meaning of a file of a known format: values of another type, missing keys, numbers that are not
finite, tensors of another shape. A mutation that cannot be applied to a file raises `Skipped`.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

Change = Callable[[bytes, random.Random], bytes]
Place = Callable[[Path, random.Random], None]

HUGE_BYTES = 10 * 10**9  # of a sparse file: no memory of this machine may be filled with it


class Skipped(Exception):
    """The mutation has nothing to change in this file."""


# ---------------------------------------------------------------------------------------------- any file's bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    changed = bytearray(_filled(data))
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def scramble(data: bytes, rng: random.Random) -> bytes:
    """64 neighbouring bytes are random ones."""
    start = rng.randrange(max(1, len(_filled(data)) - 64))
    end = min(len(data), start + 64)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The file ends early, at any byte."""
    return data[: rng.randrange(len(_filled(data)))]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    """Two blocks of the same size have changed places."""
    size = rng.randint(1, max(1, len(_filled(data)) // 3))
    first = rng.randrange(max(1, len(data) - 2 * size))
    second = rng.randrange(first + size, max(first + size, len(data) - size) + 1)
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def grow(data: bytes, rng: random.Random) -> bytes:
    """More bytes follow the end: random ones, zeros, or the file again."""
    size = rng.randint(1, 300)
    return data + rng.choice((rng.randbytes(size), bytes(size), data[:size]))


def zero(data: bytes, rng: random.Random) -> bytes:
    """A block of the file is zeros, as after a power cut."""
    start = rng.randrange(len(_filled(data)))
    size = min(len(data) - start, rng.randint(1, 4096))
    return data[:start] + bytes(size) + data[start + size :]


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


BYTES: Mapping[str, Change] = {
    "flip": flip,
    "scramble": scramble,
    "cut": cut,
    "swap blocks": swap_blocks,
    "grow": grow,
    "zero": zero,
    "empty": empty,
}


def _filled(data: bytes) -> bytes:
    if not data:
        raise Skipped("the file is empty already")
    return data


# ---------------------------------------------------------------------------------------------- what is at the path


def directory(path: Path, rng: random.Random) -> None:
    """A folder has the file's name, with or without something in it."""
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "0").write_bytes(b"0")


def fifo(path: Path, rng: random.Random) -> None:
    """A pipe into which nobody writes: to open it for reading waits forever."""
    path.unlink()
    os.mkfifo(path)


def link_loop(path: Path, rng: random.Random) -> None:
    """A symbolic link that leads to itself, in one step or in two."""
    path.unlink()
    if rng.random() < 0.5:
        path.symlink_to(path.name)
        return
    other = path.with_name(path.name + ".other")
    path.symlink_to(other.name)
    other.symlink_to(path.name)


def broken_link(path: Path, rng: random.Random) -> None:
    """A symbolic link to a file that is not there."""
    path.unlink()
    path.symlink_to("moved-away")


def sparse(path: Path, rng: random.Random) -> None:
    """The file has grown to 10 GB, or is nothing but 10 GB of zeros; on the disk it takes no room."""
    with path.open("r+b" if rng.random() < 0.5 else "wb") as file:
        file.truncate(HUGE_BYTES)


PLACES: Mapping[str, Place] = {
    "directory": directory,
    "fifo": fifo,
    "link loop": link_loop,
    "broken link": broken_link,
    "sparse": sparse,
}


def replace_file(path: Path, source: Path) -> None:
    """Another file in its place."""
    shutil.copyfile(source, path)
