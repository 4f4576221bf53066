"""Whether a Ray cluster answers at an address and takes this process's token, before Ray itself tries for minutes."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from slidr.config import ClusterConfig
from slidr.data import storage
from slidr.urls import RedactedError

PROBE_S = 5.0  # how long an address may take to accept a connection
ANSWER_S = 30.0  # and then its control store to answer
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_SOCKET = re.compile(r"AF_UNIX path length cannot exceed (\d+) bytes: (\S+)")
_START = "start one with `ray start --head`, or set cluster.address: null for a private one on this machine"


class ClusterError(RedactedError, RuntimeError):
    """A Ray cluster that cannot be reached, or that is too small for what is asked of it."""


def address_of(cluster: ClusterConfig) -> str:
    """Where to connect to: `cluster.address`, else RAY_ADDRESS, else "local" for a private cluster."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def require_answer(address: str) -> None:
    """Raises `ClusterError` within seconds where no Ray cluster answers at an address, or refuses this process's token.

    "auto" is looked up as Ray does it: the clusters that run here, else the file in which `ray start` notes its
    cluster, and which outlives it.
    """
    named = address
    if address == "auto":
        address, noted = _found()
        named = f"auto: {_address_file()} names {address}" if noted else f"auto ({address})"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"cluster.address: {named}: is the address of a job server, to which `ray job submit` goes (it reads "
            f"RAY_API_SERVER_ADDRESS); expected the cluster's own HOST:PORT, such as HOST:6379"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        raise _silent(named, "expected HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except (OSError, OverflowError) as error:  # OverflowError: a port beyond 65535
        raise _silent(named, str(error)) from error
    if not address.startswith("ray://") and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        _ask(named, address)


def refused_start(error: Exception) -> ClusterError:
    """Why no private cluster could be started, and what to do about that."""
    begin = "no private Ray cluster could be started on this machine"
    too_long = _SOCKET.search(str(error))
    if too_long is not None:
        limit, path = too_long.groups()
        return ClusterError(
            f"{begin}: its socket {path} would have a path of {len(os.fsencode(path))} bytes, the system takes "
            f"{limit}; set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
    if isinstance(error, OSError):
        folder = os.path.dirname(_address_file())
        return ClusterError(
            f"{begin}: {_first_line(error)}; Ray keeps its files in {folder}: set RAY_TMPDIR to a folder with room "
            f"that you may write"
        )
    if _is_of_token(error):
        return ClusterError(f"{begin}: {_first_line(error)}; {_TOKEN}")
    return ClusterError(f"{begin}: {_first_line(error)}; run again when it is less busy")


def refused_connection(address: str, error: Exception) -> ClusterError:
    """Why an address that answered could not be joined."""
    too_long = _SOCKET.search(str(error))
    if _is_of_token(error):
        return _token_refused(address)
    if too_long is not None:
        return ClusterError(
            f"cluster.address: {address}: {_first_line(error)}; start the cluster with a shorter TMPDIR"
        )
    return _silent(address, _first_line(error))


def _found() -> tuple[str, bool]:
    """The address that Ray finds for "auto", and whether it comes from the file of `ray start`."""
    from ray._private import services

    file = _address_file()
    note = _noted(file)
    try:
        address = str(services.canonicalize_bootstrap_address("auto"))
        return address, note is not None and services.canonicalize_bootstrap_address(note) == address
    except Exception as error:  # ConnectionError where there is none; what the file holds may be anything
        where = f" and there is no {file}" if note is None else f" and {file} holds {note[:100]!r}"
        advice = _START if note is None else f"remove that file, and {_START}"
        raise ClusterError(f"cluster.address: auto: no Ray cluster runs on this machine{where}; {advice}") from error


def _address_file() -> str:
    """Where `ray start` notes its cluster, in the folder of Ray's files."""
    from ray._common.utils import get_ray_address_file

    return str(get_ray_address_file(None))


def _noted(file: str) -> str | None:
    """The address in the file that `ray start` leaves; None where there is no such file."""
    try:
        return storage.read_bytes(file, storage.RECORD_BYTES).decode(errors="replace").strip()
    except storage.DataError:
        return None


def _ask(named: str, address: str) -> None:
    """Raises `ClusterError` unless a control store that takes this process's token answers in time."""
    import grpc

    token = _token()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(_ALIVE, request_serializer=bytes, response_deserializer=bytes)
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        try:
            call(b"", timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code()
            if code is grpc.StatusCode.UNAUTHENTICATED:
                raise _token_refused(named) from error
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                what = "something listens there, but it does not answer as a Ray cluster does"
                raise _silent(named, what) from error
            # Anything else is an answer: a version of Ray that asks in another way says itself what it lacks.


def _token() -> str | None:
    """The token that Ray would send: RAY_AUTH_TOKEN, else RAY_AUTH_TOKEN_PATH's, else ~/.ray/auth_token's."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser()
    try:
        token = storage.read_bytes(path, storage.RECORD_BYTES).decode().strip()
    except ValueError:  # a DataError is one
        return None
    return token if token and token.isascii() and token.isprintable() else None


_TOKEN = (
    "set RAY_AUTH_MODE=token and give this process the cluster's token, in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token "
    "(docs/cluster.md)"
)


def _token_refused(named: str) -> ClusterError:
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        sent = "RAY_AUTH_MODE is disabled, so none was sent"
    elif _token() is None:
        sent = "none was found"
    else:
        names = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
        sent = f"it took the one of {names[0] if names else '~/.ray/auth_token'}"
    return ClusterError(
        f"cluster.address: {named}: the cluster answers, but refused this process's token ({sent}); {_TOKEN}"
    )


def _silent(named: str, reason: str) -> ClusterError:
    stale = named.startswith("auto: ")
    advice = f"that cluster has ended: remove the file, and {_START}" if stale else _START
    return ClusterError(f"cluster.address: {named}: no Ray cluster answers ({reason}); {advice}")


def _is_of_token(error: BaseException) -> bool:
    return type(error).__name__ == "AuthenticationError" or "unauthenticated" in str(error).lower()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
