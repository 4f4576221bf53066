"""Weights by name and URL: downloads, digests, the cache."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from weight_states import same, student

from slidr.cli import main
from slidr.data import storage
from slidr.models.download import PUBLISHED, default_cache, locate_weights, resolve, weights_names
from slidr.models.export import export_safetensors
from slidr.models.files import WeightsError, read_checkpoint
from slidr.models.teachers import TEACHERS, build_teacher
from slidr.models.weights import load_student, weights_digest

ZIP = b"PK\x03\x04"  # what every zip file begins with, torch's included


class Files(http.server.BaseHTTPRequestHandler):
    """Serves what the test put in `contents`, and counts."""

    contents: dict[str, bytes] = {}  # noqa: RUF012
    promised: dict[str, int] = {}  # noqa: RUF012
    requests: list[str] = []  # noqa: RUF012
    redirects: dict[str, str] = {}  # noqa: RUF012
    unbounded: dict[str, bytes] = {}  # noqa: RUF012  # what is sent again and again, without a length

    logins: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type(self).requests.append(self.path)
        type(self).logins.append(self.headers["Authorization"])
        if self.path in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[self.path])
            self.end_headers()
            return
        if self.path in self.unbounded:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(self.unbounded[self.path])
            return
        body = self.contents.get(self.path.split("?")[0])
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.promised.get(self.path, len(body))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Files.contents, Files.promised, Files.requests, Files.redirects, Files.unbounded = {}, {}, [], {}, {}
    Files.logins = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def test_a_url_is_downloaded_once_with_progress_and_its_digest_is_checked(server: str, tmp_path: Path) -> None:
    body = ZIP + bytes(range(256)) * 8192  # 2 MiB
    Files.contents["/w.pth"] = body
    seen: list[tuple[int, int | None]] = []
    digest = hashlib.sha256(body).hexdigest()
    url = f"{server}/w.pth"
    path = resolve(url, digest, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == body
    assert path.parent == tmp_path
    assert seen[-1] == (len(body), len(body))
    assert len(seen) > 1
    assert resolve(url, digest.upper(), tmp_path) == path
    assert Files.requests == ["/w.pth"]


def test_a_password_in_a_url_is_sent_to_its_server_and_with_no_redirect(server: str, tmp_path: Path) -> None:
    Files.contents["/b.pth"], Files.redirects["/a.pth"] = ZIP, f"{server}/b.pth"
    url = f"{server}/a.pth".replace("://", "://me:p%40ss@")
    assert resolve(url, cache=tmp_path).read_bytes() == ZIP
    assert Files.requests == ["/a.pth", "/b.pth"]
    assert Files.logins == ["Basic " + base64.b64encode(b"me:p@ss").decode(), None]


def test_equal_file_names_of_two_urls_do_not_meet_in_the_cache(server: str, tmp_path: Path) -> None:
    Files.contents = {"/a/w.pth": ZIP + b"a", "/b/w.pth": ZIP + b"b"}
    assert resolve(f"{server}/a/w.pth", None, tmp_path).read_bytes() == ZIP + b"a"
    assert resolve(f"{server}/b/w.pth", None, tmp_path).read_bytes() == ZIP + b"b"


def test_a_wrong_digest_keeps_nothing(server: str, tmp_path: Path) -> None:
    Files.contents["/w.pth"] = ZIP + b"other"
    with pytest.raises(WeightsError, match=rf"/w.pth: expected SHA-256 {'0' * 64}, got c004c391.*nothing was kept"):
        resolve(f"{server}/w.pth", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_with_a_wrong_digest_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"other")
    with pytest.raises(WeightsError, match=r"w.pth: expected SHA-256 0000.*delete it"):
        resolve(str(path), "0" * 64)
    with pytest.raises(WeightsError, match=r"sha256: expected 64 hexadecimal digits, got 'abc'"):
        resolve(str(path), "abc")


def test_a_broken_off_download_keeps_nothing(server: str, tmp_path: Path) -> None:
    Files.contents["/w.pth"], Files.promised["/w.pth"] = ZIP + b"half", 12
    with pytest.raises(WeightsError, match=r"/w.pth: got 8 of 12 bytes"):
        resolve(f"{server}/w.pth", None, tmp_path)
    assert list(tmp_path.iterdir()) == []


class PlainHTTPS(http.client.HTTPConnection):
    """Stands in for HTTPSConnection where the test's server has no certificate: an https address without TLS."""

    def __init__(self, host: str, **options: Any) -> None:
        super().__init__(host, timeout=options["timeout"])


def test_an_https_address_is_followed_to_https_alone(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http.client, "HTTPSConnection", PlainHTTPS)
    secure = server.replace("http://", "https://")
    Files.contents = {"/w.pth": ZIP + b"w"}
    Files.redirects = {
        "/down": f"{server}/w.pth?token=hush",
        "/up": f"{secure}/w.pth",
        "/same": "/w.pth",
        "/twice": f"{secure}/down",
        "/file": "file:///etc/hostname",
    }
    assert resolve(f"{secure}/up", None, tmp_path).read_bytes() == ZIP + b"w"
    assert resolve(f"{secure}/same", None, tmp_path).read_bytes() == ZIP + b"w"
    assert resolve(f"{server}/up", None, tmp_path).read_bytes() == ZIP + b"w"
    before = sorted(tmp_path.iterdir())
    served = Files.requests.count("/w.pth?token=hush")
    for name in ("down", "twice"):
        with pytest.raises(WeightsError, match=r"/down: redirects to http://.*/w\.pth, which is not https") as refused:
            resolve(f"{secure}/{name}", None, tmp_path)
        assert "hush" not in str(refused.value)
    for start in (secure, server):
        with pytest.raises(WeightsError, match=r"cannot download .*/file .*not allowed|redirects to file:"):
            resolve(f"{start}/file", None, tmp_path)
    assert Files.requests.count("/w.pth?token=hush") == served
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Sign in</html>", b"\n<html>", b'{"error": "expired"}', b""])
def test_an_answer_that_is_not_weights_is_not_kept(page: bytes, server: str, tmp_path: Path) -> None:
    Files.contents["/w.pth"] = page
    with pytest.raises(WeightsError, match=r"/w\.pth: (is not a file of weights: the answer begins with|got 0 of 0)"):
        resolve(f"{server}/w.pth?token=hush", None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_format_that_is_read_is_kept(server: str, tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    torch.save(state, tmp_path / "zip")
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    export_safetensors(tmp_path / "tensors", state)
    for name in ("zip", "old", "tensors"):
        Files.contents[f"/{name}"] = (tmp_path / name).read_bytes()
        contents = read_checkpoint(resolve(f"{server}/{name}", None, tmp_path / "cache"))
        assert torch.equal(contents.get("state_dict", contents)["w"], state["w"]), name


def test_a_download_is_bounded_with_and_without_a_length(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "WEIGHTS_BYTES", 3 * 2**20)
    Files.contents["/long"], Files.promised["/long"] = ZIP, 2**40
    Files.unbounded["/endless"] = ZIP * 2**16
    for name in ("long", "endless"):
        with pytest.raises(WeightsError, match=rf"/{name}: holds more than the 3145728 bytes"):
            resolve(f"{server}/{name}", None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing_and_a_killed_ones_rest_is_removed_a_day_later(
    server: str, tmp_path: Path
) -> None:
    Files.contents["/w.pth"] = ZIP + bytes(4 * 2**20)

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(f"{server}/w.pth", None, tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    final, _ = locate_weights(f"{server}/w.pth", tmp_path)
    fresh, stale = tmp_path / f".{final.name}-aaaa.part", tmp_path / f".{final.name}-bbbb.part"
    fresh.touch()
    stale.touch()
    os.utime(stale, (0, 0))
    assert resolve(f"{server}/w.pth", None, tmp_path) == final
    assert sorted(tmp_path.iterdir()) == sorted([fresh, final])


def test_a_failed_download_says_where_to_put_the_file_and_no_secrets(server: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot download http://127.0.0.1:\d+/none.pth .*put it at (\S+),") as e:
        resolve(f"{server}/none.pth?token=hush", None, tmp_path)
    assert "hush" not in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_a_published_name_fetches_its_url_into_the_cache_and_honours_a_file_put_there(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server}/moco/moco_v2.pth.tar"
    monkeypatch.setitem(PUBLISHED, ("resnet50", "moco_v2"), url)
    with pytest.raises(WeightsError) as e:
        resolve("moco_v2", None, tmp_path)
    assert url in str(e.value)
    assert str(tmp_path / "moco_v2.pth.tar") in str(e.value)
    (tmp_path / "moco_v2.pth.tar").write_bytes(b"by hand")
    assert resolve("moco_v2", None, tmp_path).read_bytes() == b"by hand"


def test_torchvisions_files_are_checked_by_the_digest_in_their_name(tmp_path: Path) -> None:
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"not it")
    with pytest.raises(WeightsError, match=r"resnet50-0676ba61.pth: expected SHA-256 0676ba61, got"):
        resolve("imagenet", None, tmp_path, encoder="resnet50")


@pytest.mark.parametrize("name", ["obow", "pixpro", "moco_coco"])
def test_names_without_an_address_ask_for_a_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"'{name}' have no stable public address; .* path"):
        resolve(name, None, tmp_path)


def test_a_name_of_another_encoder_is_refused_with_the_names_that_fit(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file moco_v2, and no published name for resnet18 .*: imagenet\)"):
        build_teacher("ppkt_resnet18", weights="moco_v2", cache=tmp_path)
    with pytest.raises(WeightsError, match=r"cannot read 's3://bucket/w.pth'"):
        resolve("s3://bucket/w.pth", None, tmp_path)


def test_every_published_address_is_https_and_every_encoder_has_a_name() -> None:
    assert all(url is None or url.startswith("https://") for url in PUBLISHED.values())
    assert all(weights_names(builder.weights_of) for builder in TEACHERS.values())
    assert set(weights_names("resnet50")) == {
        *("imagenet", "moco_v1", "moco_v2", "swav", "deepcluster_v2", "dino", "obow", "pixpro", "moco_coco")
    }


def test_the_cache_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDR_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "weights"
    monkeypatch.delenv("SLIDR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "slidr" / "weights"


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "my weights.pth").write_bytes(b"w")
    assert resolve((tmp_path / "my weights.pth").as_uri()) == tmp_path / "my weights.pth"


def test_a_student_at_a_url_is_downloaded_once_loaded_and_exported(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    source = student(seed=1)
    torch.save({"model_points": source.state_dict()}, tmp_path / "here.pt")
    Files.contents["/s.pt"] = (tmp_path / "here.pt").read_bytes()
    url = f"{server}/s.pt?token=hush"
    for where in (url, (tmp_path / "here.pt").as_uri()):
        module = student(seed=2)
        load_student(module, where)
        assert same(module, source.state_dict())
    assert weights_digest(url) == hashlib.sha256(Files.contents["/s.pt"]).hexdigest()
    assert main(["export", url, "--format", "slidr"]) == 0  # beside it one cannot write
    exported = read_checkpoint(tmp_path / "s-slidr.pt")["model_points"]
    assert all(torch.equal(exported[name], value) for name, value in source.state_dict().items())
    assert Files.requests == ["/s.pt?token=hush"]
    Files.contents["/other.pt"] = b"<html>"
    with pytest.raises(WeightsError, match=r"/other\.pt: is not a file of weights: .*b'<html>'"):
        load_student(module, f"{server}/other.pt")
    with pytest.raises(WeightsError, match=r"s\.pt: its last layer has 64 outputs") as refused:
        load_student(student(out_channels=17), url)
    assert "hush" not in str(refused.value)
    with pytest.raises(WeightsError, match=r"cannot download .*/none\.pt"):
        load_student(module, f"{server}/none.pt")


def test_a_student_in_a_storage_that_nobody_knows_is_refused_with_what_to_use() -> None:
    for use in (lambda: load_student(student(), "ftp://host/s.pt"), lambda: weights_digest("ftp://host/s.pt")):
        with pytest.raises(WeightsError, match=r"ftp:// is not a storage that can be read here; use s3:// or a path"):
            use()
