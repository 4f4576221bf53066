"""Weights in and out: every published format, the refusals, downloads, exports."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from named_weights import load_named_weights
from torch import Tensor, nn

from slidr.config import Config, VoxelConfig, to_dict
from slidr.models.download import PUBLISHED, default_cache, resolve, weights_names
from slidr.models.export import export_openpcdet, export_safetensors, export_slidr
from slidr.models.files import WeightsError, read_checkpoint, replacing, write_checkpoint
from slidr.models.minkunet import MinkUNet14
from slidr.models.openpcdet import MinkUNetBackbone
from slidr.models.resnet import resnet18
from slidr.models.teachers import TEACHERS, build_teacher
from slidr.models.voxelnet import VoxelNet
from slidr.models.weights import encoder_state, load_encoder, load_student, voxel_expectation
from slidr.ops.voxelize import voxelize
from slidr.sparse import SparseTensor

State = dict[str, Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(module: nn.Module, state: State, except_for: str = "-") -> bool:
    own = module.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own if not name.startswith(except_for))


# ------------------------------------------------------------------------------------------ reading files


def test_a_checkpoint_that_wants_code_is_refused_by_the_name_of_what_it_wanted(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "callbacks": {Fraction: 1}}, path)
    with pytest.raises(WeightsError, match=r"hostile.pt: refused: loading it would run fractions.Fraction") as e:
        read_checkpoint(path)
    assert "weights_only=False" in str(e.value)


def test_old_format_checkpoints_are_read_and_refused_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    torch.save({"epoch": 3, "w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["w"], torch.ones(2))
    torch.save({"epoch": Fraction(1, 2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"would run fractions.Fraction"):
        read_checkpoint(path)


def test_harmless_companions_of_published_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "with-options.pt"
    options = argparse.Namespace(arch="resnet50")
    torch.save({"opt": options, "best": np.float64(0.5), "w": torch.ones(2)}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint["opt"] == options
    assert checkpoint["best"] == 0.5


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "half.pt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=rf"half.pt: not a whole checkpoint \({int(len(whole) * share)} bytes"):
        read_checkpoint(path)


def test_a_page_saved_in_place_of_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.pth"
    path.write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(WeightsError, match=r"page.pth: not a whole checkpoint"):
        read_checkpoint(path)


def test_absent_files_and_things_that_are_no_mapping_are_errors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent.pt: no such file"):
        read_checkpoint(tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match=r"list.pt: expected a mapping of names, got list"):
        read_checkpoint(tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(WeightsError, match=r"cut.safetensors: not a whole checkpoint"):
        read_checkpoint(tmp_path / "cut.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", {"w": torch.ones(1)})

    def crash_half_way() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash_half_way()
    assert torch.equal(read_checkpoint(path)["w"], torch.ones(1))
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------ encoders


@pytest.fixture(scope="module")
def resnet_state() -> State:
    return load_named_weights(resnet18()).state_dict()


FC = {"fc.weight": torch.ones(3, 512), "fc.bias": torch.ones(3)}


def published(kind: str, state: State) -> dict[str, Any]:
    """The checkpoint that authors of `kind` publish for an encoder with `state`."""
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    if kind == "torchvision":
        return {**state, **FC}
    if kind == "moco":
        mlp = {"fc.0.weight": torch.ones(4, 4), "fc.2.weight": torch.ones(4, 4)}
        queue = {"module.queue": torch.ones(2, 2), "module.queue_ptr": torch.ones(1)}
        query, key = (
            prefixed({**state, **mlp}, "module.encoder_q."),
            prefixed({**other, **mlp}, "module.encoder_k."),
        )
        return {"epoch": 800, "arch": "resnet50", "state_dict": {**key, **query, **queue}}
    if kind == "pixpro":
        keys = {**prefixed(other, "module.encoder_k."), **prefixed(state, "module.encoder.")}
        return {"opt": {"lr": 1.0}, "model": {**keys, "module.projector.linear1.weight": torch.ones(2, 2)}}
    if kind == "swav":
        heads = {"projection_head.0.weight": torch.ones(2, 2), "prototypes.weight": torch.ones(2, 2)}
        return prefixed({**state, **heads}, "module.")
    if kind == "obow":
        return {"network": {**state, **FC}}
    if kind == "dino":
        return dict(state)
    if kind == "dino_training":
        heads = {"module.head.mlp.0.weight": torch.ones(2, 2)}
        return {
            "student": {**prefixed(other, "module.backbone.")},
            "teacher": {**prefixed(state, "module.backbone."), **heads},
        }
    if kind == "slidr":
        return {
            "model_points": {"final.kernel": torch.ones(2, 2)},
            "model_images": {**prefixed(state, "encoder."), "decoder.0.weight": torch.ones(2, 2)},
        }
    raise AssertionError(kind)


FORMATS = ["torchvision", "moco", "pixpro", "swav", "obow", "dino", "dino_training", "slidr"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_published_encoder_format_loads_whole(kind: str, resnet_state: State, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.pth"
    torch.save(published(kind, resnet_state), path)
    encoder = resnet18()
    report = load_encoder(encoder, read_checkpoint(path), "resnet18", str(path))
    assert same(encoder, resnet_state)
    assert set(report.loaded) == set(resnet_state)
    assert report.missing == ()
    assert all(name.startswith(("fc.", "projection_head.", "prototypes.")) for name in report.skipped)


@pytest.mark.parametrize("name", ["dino_vits16", "efficientnet_lite0"])
def test_other_encoders_load_strictly_from_a_path(name: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = build_teacher(name)
    state = teacher.encoder.state_dict()
    torch.save({**state, **({"head.weight": torch.ones(1)} if name == "dino_vits16" else {})}, tmp_path / "w.pth")
    loaded = build_teacher(name, weights=str(tmp_path / "w.pth"))
    assert same(loaded.encoder, state)


def test_packaged_imagenet_weights_load_and_only_the_unused_blocks_are_skipped() -> None:
    encoder = TEACHERS["efficientnet_lite0"].encoder()
    state = read_checkpoint(resolve("imagenet", encoder="efficientnet_lite0"))
    report = load_encoder(encoder, state, "efficientnet_lite0")
    assert same(encoder, state)
    assert set(report.loaded) | set(report.skipped) == set(state)
    assert report.missing == ()
    blocks = {int(name.split(".")[1]) for name in report.skipped if name.startswith("_blocks.")}
    assert blocks == {11, 12, 13, 14, 15}


def test_counters_of_batches_may_be_missing_but_statistics_may_not(resnet_state: State) -> None:
    old = {name: value for name, value in resnet_state.items() if not name.endswith("num_batches_tracked")}
    encoder = resnet18()
    report = load_encoder(encoder, old, "resnet18")
    assert set(report.loaded) == set(old)
    assert report.missing == ()
    del old["layer3.1.bn2.running_var"]
    with pytest.raises(WeightsError, match=r"x.pth: lacks what the model needs: 1 \(layer3.1.bn2.running_var\)"):
        load_encoder(encoder, old, "resnet18", "x.pth")


def test_a_deeper_network_is_refused(resnet_state: State) -> None:
    deeper = {**resnet_state, "layer3.2.conv1.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"no place for: 1 \(layer3.2.conv1.weight\)"):
        load_encoder(resnet18(), deeper, "resnet18")


def test_a_wrong_shape_is_refused_with_both_shapes_and_changes_nothing(resnet_state: State) -> None:
    wrong = {**resnet_state, "conv1.weight": torch.ones(64, 1, 7, 7)}
    encoder = resnet18()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=r"conv1.weight has shape \(64, 1, 7, 7\), the model's has \(64, 3, 7, 7\)"):
        load_encoder(encoder, wrong, "resnet18")
    assert same(encoder, before)


def test_a_checkpoint_without_the_encoder_is_an_error_that_shows_what_is_in_it() -> None:
    with pytest.raises(WeightsError, match=r"v.pth: no vits16 in it: .* cls_token, got 1 \(conv1.weight\)"):
        encoder_state({"conv1.weight": torch.ones(1)}, "vits16", "v.pth")
    with pytest.raises(WeightsError, match=r"e.pth: no state dict in it; .* found 1 \(epoch\)"):
        encoder_state({"epoch": 3}, "resnet50", "e.pth")


# ------------------------------------------------------------------------------------------ names and URLs


class Files(http.server.BaseHTTPRequestHandler):
    """Serves what the test put in `contents`, and counts."""

    contents: dict[str, bytes] = {}  # noqa: RUF012
    promised: dict[str, int] = {}  # noqa: RUF012
    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type(self).requests.append(self.path)
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
    Files.contents, Files.promised, Files.requests = {}, {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def test_a_url_is_downloaded_once_with_progress_and_its_digest_is_checked(server: str, tmp_path: Path) -> None:
    body = bytes(range(256)) * 8192  # 2 MiB
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


def test_equal_file_names_of_two_urls_do_not_meet_in_the_cache(server: str, tmp_path: Path) -> None:
    Files.contents = {"/a/w.pth": b"a", "/b/w.pth": b"b"}
    assert resolve(f"{server}/a/w.pth", None, tmp_path).read_bytes() == b"a"
    assert resolve(f"{server}/b/w.pth", None, tmp_path).read_bytes() == b"b"


def test_a_wrong_digest_keeps_nothing(server: str, tmp_path: Path) -> None:
    Files.contents["/w.pth"] = b"other"
    with pytest.raises(WeightsError, match=rf"/w.pth: expected SHA-256 {'0' * 64}, got d9298a10.*nothing was kept"):
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
    Files.contents["/w.pth"], Files.promised["/w.pth"] = b"half", 8
    with pytest.raises(WeightsError, match=r"/w.pth: got 4 of 8 bytes"):
        resolve(f"{server}/w.pth", None, tmp_path)
    assert list(tmp_path.iterdir()) == []


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


# ------------------------------------------------------------------------------------------ students


def student(out_channels: int = 64, seed: int = 0) -> MinkUNet14:
    torch.manual_seed(seed)
    return MinkUNet14(out_channels=out_channels, width=0.25)


@pytest.fixture(scope="module")
def student_state() -> State:
    return student(seed=1).state_dict()


SLIDR_CONFIG = {"voxel_size": 0.1, "cylindrical_coordinates": True, "model_points": "minkunet"}


def student_checkpoint(kind: str, state: State) -> dict[str, Any]:
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    if kind == "own":
        return {"student": state, "head": {"0.weight": torch.ones(1)}, "config": to_dict(Config()), "step": 7}
    if kind == "slidr_pretraining":
        images = {"encoder.conv1.weight": torch.ones(1), "decoder.0.weight": torch.ones(1)}
        return {"model_points": state, "model_images": images, "epoch": 50, "config": SLIDR_CONFIG}
    if kind == "slidr_wrapped":
        return {"model_points": prefixed(state, "module."), "config": SLIDR_CONFIG}
    if kind == "lightning":
        images = {"model_images.encoder.conv1.weight": torch.ones(1)}
        return {
            "state_dict": {**prefixed(state, "model_points."), **images},
            "hyper_parameters": SLIDR_CONFIG,
        }
    if kind == "lightning_downstream":
        return {"state_dict": prefixed(state, "model."), "epoch": 1}
    if kind == "pointcontrast":
        return {"state_dict": state, "iteration": 100}
    if kind == "encoder":
        return {"state_dict": prefixed(state, "module.encoder.")}
    if kind == "plain":
        return dict(state)
    if kind == "depthcontrast":
        trunks = {
            **prefixed(other, "module.trunk.0."),
            **prefixed(state, "module.trunk.2."),
            **prefixed(other, "module.trunk.3."),
            "module.trunk.2.head.clf.0.weight": torch.ones(2, 2),
        }
        criterion = {"params": torch.ones(1)}
        return {"epoch": 2, "model": trunks, "optimizer": {"state": {}}, "train_criterion": criterion}
    raise AssertionError(kind)


STUDENTS = [
    *("own", "slidr_pretraining", "slidr_wrapped", "lightning", "lightning_downstream", "pointcontrast"),
    *("encoder", "plain", "depthcontrast"),
]


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_published_student_format_loads_whole(kind: str, student_state: State, tmp_path: Path) -> None:
    torch.save(student_checkpoint(kind, student_state), tmp_path / "s.pt")
    module = student()
    report = load_student(module, tmp_path / "s.pt", expect=voxel_expectation(VoxelConfig()))
    assert same(module, student_state)
    assert set(report.loaded) == set(student_state)
    assert report.missing == ()
    skipped = {"lightning": 1, "depthcontrast": 2 * len(student_state) + 1}.get(kind, 0)
    assert len(report.skipped) == skipped


def test_a_voxelnet_loads_from_spconv_1_and_spconv_2_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = VoxelNet().state_dict()
    old = {
        name: value.permute(1, 2, 3, 4, 0).contiguous() if value.ndim == 5 else value for name, value in state.items()
    }
    for number, layout in enumerate((state, old)):
        torch.save({"model_points": layout}, tmp_path / f"{number}.pt")
        module = VoxelNet()
        load_student(module, tmp_path / f"{number}.pt")
        assert same(module, state)


def test_another_class_count_is_an_error_with_both_unless_the_head_is_replaced(
    student_state: State, tmp_path: Path
) -> None:
    path = tmp_path / "s.pt"
    torch.save({"model_points": student_state}, path)
    module = student(out_channels=17)
    fresh = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(WeightsError, match=r"s.pt: its last layer has 64 outputs \(classes\), the model's has 17"):
        load_student(module, path)
    assert same(module, fresh)
    report = load_student(module, path, head="skip")
    assert same(module, student_state, except_for="final.")
    assert torch.equal(module.state_dict()["final.kernel"], fresh["final.kernel"])
    assert report.skipped == ("final.bias", "final.kernel")
    assert report.missing == ("final.kernel", "final.bias")
    assert "skipped 2 (final.bias, final.kernel)" in str(report)


def test_a_checkpoint_without_a_head_loads_only_for_fine_tuning(student_state: State, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    torch.save({n: v for n, v in student_state.items() if not n.startswith("final.")}, path)
    with pytest.raises(WeightsError, match=r'final.kernel, final.bias\); .* head="skip"'):
        load_student(student(), path)
    module = student()
    assert load_student(module, path, head="skip").skipped == ()
    assert same(module, student_state, except_for="final.")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"voxel_size": 0.05, "cylindrical_coordinates": True},
            r"voxel_size 0.05, this run has \(0.1, 1.0, 0.1\)",
        ),
        (
            {"voxel_size": 0.1, "cylindrical_coordinates": False},
            r"cylindrical_coordinates False, this run has True",
        ),
        ({"voxel_size": [0.1, 0.1, 0.1]}, r"voxel_size \[0.1, 0.1, 0.1\], this run has \(0.1, 1.0, 0.1\)"),
        (
            to_dict(Config()) | {"data": {"voxel": {"size": [0.2, 1.0, 0.2], "cylindrical": True}}},
            r"voxel_size \[0.2, 1.0, 0.2\], this run has \(0.1, 1.0, 0.1\)",
        ),
    ],
)
def test_other_voxels_are_an_error_with_both_values(
    config: dict[str, Any], message: str, student_state: State, tmp_path: Path
) -> None:
    torch.save({"model_points": student_state, "config": config}, tmp_path / "s.pt")
    with pytest.raises(WeightsError, match=r"s.pt: was trained with " + message):
        load_student(student(), tmp_path / "s.pt", expect=voxel_expectation(VoxelConfig()))
    load_student(student(), tmp_path / "s.pt")  # nothing expected, nothing compared


def test_a_cartesian_scalar_is_a_cube(student_state: State, tmp_path: Path) -> None:
    config = {"voxel_size": 0.1, "cylindrical_coordinates": False}
    torch.save({"model_points": student_state, "config": config}, tmp_path / "s.pt")
    cube = VoxelConfig(cylindrical=False, size=(0.1, 0.1, 0.1))
    load_student(student(), tmp_path / "s.pt", expect=voxel_expectation(cube))


def test_what_matches_nothing_or_too_much_or_too_little_is_an_error(student_state: State, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    torch.save({"backbone.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"s.pt: matches nothing: it has 1 \(backbone.weight\), the model has"):
        load_student(student(), path)
    torch.save({**student_state, "block9.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"no place for: 1 \(block9.weight\)"):
        load_student(student(), path)
    torch.save({n: v for n, v in student_state.items() if n != "conv0p1s1.kernel"}, path)
    with pytest.raises(WeightsError, match=r"lacks what the model needs: 1 \(conv0p1s1.kernel\)"):
        load_student(student(), path)
    torch.save({**student_state, "module.conv0p1s1.kernel": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"two entries for conv0p1s1.kernel"):
        load_student(student(), path)


# ------------------------------------------------------------------------------------------ out


def test_slidrs_layout_holds_both_networks_and_its_own_voxel_names(student_state: State, tmp_path: Path) -> None:
    teacher = build_teacher("ppkt_resnet18").state_dict()
    out = export_slidr(student_state, teacher, 50, to_dict(Config()))
    assert set(out) == {"model_points", "model_images", "epoch", "config"}
    assert out["config"]["voxel_size"] == 0.1
    assert out["config"]["cylindrical_coordinates"] is True
    path = write_checkpoint(tmp_path / "slidr.pt", out)
    module = student()
    load_student(module, path, expect=voxel_expectation(VoxelConfig()))
    assert same(module, student_state)
    loaded = build_teacher("ppkt_resnet18", weights=str(path))
    assert all(torch.equal(v, teacher[f"encoder.{n}"]) for n, v in loaded.encoder.state_dict().items())
    assert "model_images" not in export_slidr(student_state, None, 50, {})


@pytest.mark.parametrize(
    ("voxel", "expected"),
    [
        (VoxelConfig(size=(0.1, 0.5, 0.1)), [0.1, 0.5, 0.1]),
        (VoxelConfig(cylindrical=False, size=(0.05, 0.05, 0.05)), 0.05),
        (VoxelConfig(cylindrical=False, size=(0.1, 0.1, 0.2)), [0.1, 0.1, 0.2]),
    ],
)
def test_slidrs_voxel_size_is_a_number_only_where_that_says_it_all(voxel: VoxelConfig, expected: Any) -> None:
    config = {"data": {"voxel": to_dict(voxel)}}
    assert export_slidr({}, None, 0, config)["config"]["voxel_size"] == expected


def test_safetensors_come_back_whole_with_their_config(student_state: State, tmp_path: Path) -> None:
    config = to_dict(Config())
    path = export_safetensors(tmp_path / "s.safetensors", student_state, epoch=50, config=config)
    checkpoint = read_checkpoint(path)
    assert checkpoint["config"] == config
    assert checkpoint["epoch"] == 50
    module = student()
    load_student(module, path, expect=voxel_expectation(VoxelConfig()))
    assert same(module, student_state)
    with pytest.raises(WeightsError, match=r"voxel_size \[0.1, 1.0, 0.1\], this run has \(0.2, 1.0, 0.2\)"):
        load_student(module, path, expect=voxel_expectation(VoxelConfig(size=(0.2, 1.0, 0.2))))


def openpcdet_backbone_8x() -> dict[str, tuple[int, ...]]:
    """Parameters of OpenPCDet's VoxelBackBone8x at 4 input channels, written out from its layer table."""
    shapes: dict[str, tuple[int, ...]] = {}

    def block(name: str, c_in: int, c_out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        shapes[f"{name}.0.weight"] = (c_out, *kernel, c_in)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.1.{entry}"] = (c_out,)
        shapes[f"{name}.1.num_batches_tracked"] = ()

    block("conv_input", 4, 16)
    block("conv1.0", 16, 16)
    for stage, c_in, c_out in (("conv2", 16, 32), ("conv3", 32, 64), ("conv4", 64, 64)):
        block(f"{stage}.0", c_in, c_out)
        block(f"{stage}.1", c_out, c_out)
        block(f"{stage}.2", c_out, c_out)
    block("conv_out", 64, 128, (3, 1, 1))
    return shapes


def test_openpcdet_gets_every_weight_of_voxelbackbone8x_and_no_other(tmp_path: Path) -> None:
    state = VoxelNet().state_dict()
    out = read_checkpoint(export_openpcdet(tmp_path / "pcdet.pth", state))["model_state"]
    expected = {f"backbone_3d.{name}": shape for name, shape in openpcdet_backbone_8x().items()}
    assert {name: tuple(value.shape) for name, value in out.items()} == expected
    assert all(torch.equal(value, state[name.removeprefix("backbone_3d.")]) for name, value in out.items())


def test_openpcdet_gets_every_weight_of_the_minkunet_backbone_but_its_head(tmp_path: Path) -> None:
    with torch.device("meta"):
        backbone = MinkUNetBackbone({}, input_channels=4)
    expected = {f"backbone_3d.{n}": v.shape for n, v in backbone.state_dict().items() if not n.startswith("final.")}
    from slidr.models.minkunet import MinkUNet34C

    with torch.device("meta"):
        state = MinkUNet34C().state_dict()
    state = {name: torch.empty_like(value, device="cpu") for name, value in state.items()}
    out = read_checkpoint(export_openpcdet(tmp_path / "pcdet.pth", state))["model_state"]
    assert {name: value.shape for name, value in out.items()} == expected


def test_openpcdet_export_refuses_another_network() -> None:
    with pytest.raises(WeightsError, match=r"expected the state dict of a VoxelNet .* names such as conv1.weight"):
        export_openpcdet("never.pth", {"conv1.weight": torch.ones(1)})


def test_the_minkunet_backbone_gives_every_point_its_voxels_feature() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    clouds = [rng.uniform(-4, 4, size=(n, 4)).astype(np.float32) for n in (40, 25)]
    points = np.concatenate([np.insert(cloud, 0, i, axis=1) for i, cloud in enumerate(clouds)])
    order = rng.permutation(len(points))  # clouds interleaved
    batch = {
        "points": torch.from_numpy(points[order].astype(np.float32)),
        "batch_size": 2,
        "frame_id": "kept",
    }
    options = {"NUM_POINT_FEATURES": 5, "INTENSITY_SCALE": 255.0, "INTENSITY_OFFSET": 1.0}
    backbone = MinkUNetBackbone(options, input_channels=4, grid_size=None).eval()
    assert backbone.num_point_features == 5
    with torch.no_grad():
        out = backbone(batch)
        alone = []
        for cloud in clouds:
            voxels = voxelize(cloud[:, :3])
            intensity = torch.from_numpy(cloud[voxels.point_of_voxel, 3:] * 255 + 1)
            grid = torch.from_numpy(np.insert(voxels.coordinates, 0, 0, axis=1).astype(np.int32))
            answer = super(MinkUNetBackbone, backbone).forward(SparseTensor(intensity, grid)).features
            alone.append(answer[torch.from_numpy(voxels.voxel_of_point)])
    expected = torch.cat(alone)[torch.from_numpy(order)]
    assert out["point_features"].shape == (65, 5)
    assert torch.allclose(out["point_features"], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(out["point_coords"], batch["points"][:, :4])
    assert out["frame_id"] == "kept"
    with pytest.raises(ValueError, match="expected x, y, z, intensity, got 3 channels"):
        MinkUNetBackbone({}, input_channels=3)
