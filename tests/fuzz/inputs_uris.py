"""Paths, URLs and URIs as a user types them: the file `uri` holds one, and its readers get the text.

Nothing but this machine answers: names are not looked up, so that a damaged host costs no time.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slidr.data import storage
from slidr.data.frames import FrameTable
from slidr.models.download import resolve, student_file
from slidr.models.files import read_checkpoint
from slidr.tracking_store import check_store
from slidr.urls import redact_url

from .harness import OTHERS, Input
from .inputs_tables import make_table
from .inputs_weights import make_student
from .mutations import PLACES, Change

USER, PASSWORD, TOKEN = "alice", "pa55word", "t0ken"
_URLS = (
    "{s}://127.0.0.1:99999/a.pt",
    "{s}://127.0.0.1:port/a.pt",
    "{s}://127.0.0.1:-1/a.pt",
    "{s}://[::1/a.pt",
    "{s}://",
    "{s}:///a.pt",
    "{s}://{u}:{p}@127.0.0.1:9/a.pt?token={t}",
    "{s}://{u}:{p}/{p}@127.0.0.1:9/a.pt?token={t}#{t}",
    "{s}://127.0.0.1:9/{long}?token={t}",
    "{s}://{long}/a.pt",
    "{s}://127.0.0.1:9/%zz%00",
    "{s}://127.0.0.1:9/a b.pt",
    "{s}://²/a.pt",
    "{s}://127.0.0.1:9/\udce4.pt",
    "{s}://\udce4/a.pt",
)
_PATHS = (
    "",
    " ",
    "~",
    "~nobody/a.pt",
    "/",
    ".",
    "..",
    "file://",
    "file:///nowhere/a.pt",
    "file://elsewhere/a.pt",
    "file:./a.pt",
    "{long}",
    "{long}/{long}",
    "nowhere/\n/a.pt",
    "\udce4.pt",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "foo://bucket/a.pt",
    "://a.pt",
    "s3:///a.pt",
    "s3://bucket/a.pt?nosuch={t}",
    "s3://{u}:{p}@buck et/a.pt",
)


def _odd(options: tuple[str, ...]) -> Change:
    def change(data: bytes, rng: random.Random) -> bytes:
        words = {"s": rng.choice(("http", "https")), "u": USER, "p": PASSWORD, "t": TOKEN, "long": "x" * 400}
        return os.fsencode(rng.choice(options).format(**words))

    return change


CHANGES = {"odd URL": _odd(_URLS), "odd path": _odd(_PATHS)}


def typed() -> str:
    return os.fsdecode(Path("uri").read_bytes())


def names(text: str) -> bool:
    """Whether a message gives the URI without its secrets: the whole of it, or else its host or its last part."""
    uri = typed()
    if PASSWORD in text or TOKEN in text:
        return False
    shown = redact_url(uri).replace("file://", "")
    parts = [
        shown,
        shown.partition("://")[2].partition("/")[0],
        shown.rstrip("/").rpartition("/")[2],
        repr(shown)[1:-1],
    ]
    return any(part and part in text for part in parts) or not uri.strip()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    before = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return before(host, *rest, **more)

    socket.getaddrinfo = lookup  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.getaddrinfo = before


def _asked(read: Callable[[str], Any]) -> Callable[[], Any]:
    def asked() -> Any:
        with _alone():
            return read(typed())

    return asked


def checked(uri: str) -> Any:
    """The look at a tracking store before a job."""
    check_store(uri, "experiment")
    return "can be used"


def is_a_file(value: Any) -> bool:
    """Whether a URI is of an sqlite file, which the first run makes."""
    return typed().startswith("sqlite:///")


def _uri(text: str, make: Callable[[int], None] = lambda variant: None) -> Callable[[int], None]:
    def written(variant: int) -> None:
        make(variant)
        Path("uri").write_text(text)

    return written


INPUTS = (
    Input(
        "URI of a student",
        _uri("student.pt", make_student),
        "uri",
        _asked(lambda uri: read_checkpoint(student_file(uri, "cache"))),
        CHANGES,
        names=names,
        without=(*PLACES, *OTHERS),
    ),
    Input(
        "URI of a teacher",
        _uri("student.pt", make_student),
        "uri",
        _asked(lambda uri: read_checkpoint(resolve(uri, cache="cache"))),
        CHANGES,
        names=names,
        without=(*PLACES, *OTHERS),
    ),
    Input(
        "URI of a frame table",
        _uri("frames.parquet", make_table),
        "uri",
        _asked(lambda uri: FrameTable.open(uri).tokens),
        {"odd path": CHANGES["odd path"]},
        names=names,
        without=(*PLACES, *OTHERS),
    ),
    Input(
        "URI of a file",
        _uri("student.pt", make_student),
        "uri",
        _asked(lambda uri: storage.read_bytes(uri)),
        {"odd path": CHANGES["odd path"]},
        names=names,
        without=(*PLACES, *OTHERS),
    ),
    Input(
        "URI of a tracking store",
        _uri("sqlite:///mlflow.db"),
        "uri",
        _asked(checked),
        {"odd URL": CHANGES["odd URL"]},
        names=names,
        says=is_a_file,
        without=(*PLACES, *OTHERS),
    ),
)
