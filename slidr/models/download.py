"""From a name to a weights file on this machine: published names, paths, URLs; checked, atomic downloads."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from slidr.data import storage
from slidr.models import efficientnet
from slidr.models.archive import HEAD_BYTES, kind_of
from slidr.models.files import WeightsError, replacing, sha256_of
from slidr.urls import redact_url, redacting_logger

EncoderName = Literal["resnet18", "resnet50", "vits16", "vits8", "vitb16", "vitb8", "efficientnet_lite0"]
Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says

_log = redacting_logger(__name__)
_STALE_S = 86400.0

_META = "https://dl.fbaipublicfiles.com/"
_DINO = _META + "dino/"
_TORCH = "https://download.pytorch.org/models/"

# (encoder, name) -> where the file is published. None: published without a stable address, so pass a path.
PUBLISHED: dict[tuple[EncoderName, str], str | None] = {
    ("resnet18", "imagenet"): _TORCH + "resnet18-f37072fd.pth",
    ("resnet50", "imagenet"): _TORCH + "resnet50-0676ba61.pth",
    ("resnet50", "moco_v1"): _META + "moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
    ("resnet50", "moco_v2"): _META + "moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
    ("resnet50", "swav"): _META + "deepcluster/swav_800ep_pretrain.pth.tar",
    ("resnet50", "deepcluster_v2"): _META + "deepcluster/deepclusterv2_800ep_pretrain.pth.tar",
    ("resnet50", "dino"): _DINO + "dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
    ("resnet50", "obow"): None,
    ("resnet50", "pixpro"): None,
    ("resnet50", "moco_coco"): None,
    ("vits16", "dino"): _DINO + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ("vits8", "dino"): _DINO + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    ("vitb16", "dino"): _DINO + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ("vitb8", "dino"): _DINO + "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
}

# torchvision puts the first digits of a file's SHA-256 into its name.
_DIGEST_IN_NAME = {"resnet18-f37072fd.pth": "f37072fd", "resnet50-0676ba61.pth": "0676ba61"}


def weights_names(encoder: EncoderName) -> list[str]:
    """The published names that fit `encoder`."""
    if encoder == "efficientnet_lite0":
        return ["imagenet"]
    return [name for of, name in PUBLISHED if of == encoder]


def default_cache() -> Path:
    """Where downloaded weights are kept: ${SLIDR_CACHE:-~/.cache/slidr}/weights."""
    root = os.environ.get("SLIDR_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "slidr") / "weights"


def resolve(
    weights: str,
    sha256: str | None = None,
    cache: str | Path | None = None,
    *,
    encoder: EncoderName = "resnet50",
    progress: Progress | None = None,
) -> Path:
    """The file on this machine that `weights` means: a published name of `encoder`, an http(s) URL, or a
    path.

    URLs are downloaded once into `cache`, atomically; `progress` is called with the bytes so far and in all. The
    file's SHA-256 is compared with `sha256` when given. Raises `WeightsError` saying where to put the file by
    hand.
    """
    if sha256 is not None and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        raise WeightsError(f"sha256: expected 64 hexadecimal digits, got {sha256!r}")
    path, url = locate_weights(weights, cache, encoder=encoder)
    if url is not None:
        path = _fetched(url, path, sha256, progress)
    expected = sha256.lower() if sha256 is not None else _DIGEST_IN_NAME.get(path.name)
    if expected is not None:
        got = sha256_of(path)
        if not got.startswith(expected):
            raise WeightsError(
                f"{path}: expected SHA-256 {expected}, got {got}; the file is damaged or another one: "
                f"delete it and fetch it again, or correct the digest"
            )
    return path


def locate_weights(
    weights: str, cache: str | Path | None = None, *, encoder: EncoderName = "resnet50"
) -> tuple[Path, str | None]:
    """The file on this machine that `weights` means, and the URL it comes from where it is not there yet.

    Raises `WeightsError` as `resolve` does for what nobody publishes and for a path without a file.
    """
    folder = Path(cache) if cache is not None else default_cache()
    if encoder == "efficientnet_lite0" and weights == "imagenet":
        return efficientnet.packaged_weights(), None
    if (encoder, weights) in PUBLISHED:
        url = PUBLISHED[encoder, weights]
        if url is None:
            raise WeightsError(
                f"weights {weights!r} have no stable public address; get the file from their authors and "
                f"pass its path instead of the name"
            )
        path = folder / _name_in(url)
    elif is_url(weights):
        # Two hosts may use one file name.
        tag = hashlib.sha256(weights.encode()).hexdigest()[:8]
        url, path = weights, folder / f"{tag}-{_name_in(weights)}"
    else:
        return _local(weights, encoder), None
    return path, None if path.is_file() else url


def is_url(weights: str) -> bool:
    """Whether weights are downloaded over http(s)."""
    return weights.startswith(("http://", "https://"))


def student_location(weights: str | Path, cache: str | Path | None = None) -> tuple[str, str | None]:
    """Where a student's file is or will be, and the URL it comes from where it is not there yet."""
    name = os.fspath(weights)
    if is_url(name):
        path, url = locate_weights(name, cache)
        return str(path), url
    return (name if storage.is_remote(name) else storage.join(name)), None  # file:// is a path


def student_file(weights: str | Path, cache: str | Path | None = None) -> str:
    """Where a student's file can be read: an http(s) URL's copy on this machine, anything else as it is.

    URLs are downloaded once into `cache`, as `resolve` does it. Raises `WeightsError` where that fails.
    """
    name = os.fspath(weights)
    return str(resolve(name, cache=cache)) if is_url(name) else student_location(name)[0]


def _local(weights: str, encoder: EncoderName) -> Path:
    if "://" in weights and not weights.startswith("file://"):
        raise WeightsError(
            f"weights: cannot read {redact_url(weights)!r}; use an https://, http:// or file:// URL, or a path"
        )
    path = Path(unquote(urlsplit(weights).path) if weights.startswith("file://") else weights).expanduser()
    if path.exists():
        try:
            storage.require_regular(path, storage.WEIGHTS_BYTES)
        except storage.DataError as error:
            raise WeightsError(str(error)) from error
        return path
    names = ", ".join(weights_names(encoder)) or "none"
    raise WeightsError(f"weights: no file {path}, and no published name for {encoder} (there are: {names})")


def _fetched(url: str, path: Path, sha256: str | None, progress: Progress | None) -> Path:
    """`path`, downloaded from `url` unless it is there already."""
    if path.is_file():
        return path
    expected = sha256.lower() if sha256 is not None else _DIGEST_IN_NAME.get(path.name, "")
    name = redact_url(url)
    _log.info("downloading %s to %s", name, path)
    _sweep_partial(path)
    try:
        request = _request(url)
        with _opener().open(request, timeout=30) as response, replacing(path) as partial:
            got = _download(response, partial, name, path, progress)
            if not got.startswith(expected):
                raise WeightsError(f"{name}: expected SHA-256 {expected}, got {got}; nothing was kept")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise WeightsError(
            f"cannot download {name} ({redact_url(str(reason))}); download it elsewhere and put it at {path}, "
            f"or pass another file's path as the weights"
        ) from None
    return path


def _request(url: str) -> urllib.request.Request:
    """A request with the URL's user and password, if any, as urllib takes none in an address; no redirect gets them."""
    parts = urlsplit(url)
    user, mark, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "slidr"})
    if mark:
        name, _, password = user.partition(":")
        secret = b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


def _download(response: Any, partial: Path, name: str, path: Path, progress: Progress | None) -> str:
    """Writes the answer to `partial` and returns its SHA-256; raises `WeightsError` where it is not whole weights."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    digest, done = hashlib.sha256(), 0
    with open(partial, "wb") as file:
        while chunk := response.read(1 << 20):
            if done == 0 and kind_of(chunk[:HEAD_BYTES]) is None:
                raise WeightsError(
                    f"{name}: is not a file of weights: the answer begins with {chunk[:16]!r} (an error page?); "
                    f"nothing was kept; download it in a browser and put it at {path}"
                )
            done += len(chunk)
            if max(done, total or 0) > storage.WEIGHTS_BYTES:
                raise WeightsError(
                    f"{name}: holds more than the {storage.WEIGHTS_BYTES} bytes that weights may have; nothing was kept"
                )
            file.write(chunk)
            digest.update(chunk)
            if progress is not None:
                progress(done, total)
    if done == 0 or (total is not None and done != total):
        raise WeightsError(f"{name}: got {done} of {total} bytes; try again, or put it at {path}")
    return digest.hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) addresses, and from https to https alone."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        wanted = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in wanted:
            raise WeightsError(
                f"{redact_url(req.full_url)}: redirects to {redact_url(newurl)}, which is not "
                f"{' or '.join(wanted)}; nothing was downloaded: use an address that stays on https"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def _sweep_partial(path: Path) -> None:
    """Removes what killed downloads of the same file left, once it is a day old (others may be at it now)."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}-*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _STALE_S:
                partial.unlink()


def _name_in(url: str) -> str:
    return Path(unquote(urlsplit(url).path)).name or "weights"
