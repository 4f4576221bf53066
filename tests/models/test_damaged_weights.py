"""Students and teachers with damaged bytes, or with values that are not numbers: refused by file and tensor."""

from __future__ import annotations

import json
import os
import random
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_bytes import damage
from torch import nn
from weight_states import State, prefixed, same, student

from slidr.cli import main
from slidr.config import Config, VoxelConfig, to_dict
from slidr.models.export import export_safetensors
from slidr.models.files import WeightsError, read_checkpoint, write_checkpoint
from slidr.models.resnet import resnet18
from slidr.models.teachers import build_teacher
from slidr.models.weights import load_student, student_state, voxel_expectation

SMALL = {"conv0p1s1.kernel": torch.arange(30.0).view(5, 1, 6), "bn0.running_var": torch.ones(6), "n": torch.tensor(3)}


def values(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a file, as bytes with their shapes, and everything else in it."""
    contents = read_checkpoint(path)
    state = contents.pop("model_points", None) or contents.pop("state_dict", {})
    contents.pop("format", None)  # names the format, and changes no value
    return {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in state.items()}, contents


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_damaged_student_is_refused_or_holds_every_value_unchanged(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"student{ending}"
    if ending == ".pt":
        write_checkpoint(path, {"model_points": SMALL, "epoch": 3, "config": {"voxel_size": 0.1}})
    else:
        export_safetensors(path, SMALL, 3, {"voxel_size": 0.1})
    whole, intact = path.read_bytes(), values(path)
    refusals = []
    for seed in range(300):
        path.write_bytes(damage(whole, random.Random(seed)))
        try:
            got = values(path)
        except WeightsError as error:
            refusals.append(str(error))
        else:
            assert got == intact, f"seed {seed}: a damaged student was read with other values"
    assert len(refusals) > 150
    assert all(str(path) in message for message in refusals)


def test_a_flipped_bit_in_any_byte_of_our_safetensors_changes_no_value(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    export_safetensors(path, SMALL, 3, {"voxel_size": 0.1})
    whole, intact = path.read_bytes(), values(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert values(path) == intact, f"byte {at}"
        except WeightsError:
            continue


def test_safetensors_of_others_and_of_ours_before_there_were_digests_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(SMALL, tmp_path / "other.safetensors", metadata={"format": "pt", "anything": "else"})
    assert torch.equal(read_checkpoint(tmp_path / "other.safetensors")["state_dict"]["n"], SMALL["n"])
    save_file(SMALL, tmp_path / "old.safetensors", metadata={"format": '"slidr"', "epoch": "3"})
    assert read_checkpoint(tmp_path / "old.safetensors")["epoch"] == 3


def test_a_checkpoint_of_torch_called_safetensors_is_refused(tmp_path: Path) -> None:
    torch.save(SMALL, tmp_path / "s.safetensors")
    with pytest.raises(WeightsError, match=r"s\.safetensors: .* begins with b'PK.*, which is not safetensors"):
        read_checkpoint(tmp_path / "s.safetensors")


def test_files_written_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SMALL, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "plain.pt")["n"], SMALL["n"])


# ------------------------------------------------------------------------------------------------ not numbers

STEM, VARIANCE, COUNT = "conv0p1s1.kernel", "bn0.bn.running_var", "bn0.bn.num_batches_tracked"
SPOILED: dict[str, tuple[str, Any, str]] = {
    "one NaN": (STEM, lambda v: v.flatten().index_fill(0, torch.tensor(5), torch.nan).view(v.shape), r"1 of \d+ value"),
    "all infinite": (STEM, lambda v: v + torch.inf, r"(\d+) of \1 values are NaN or infinite"),
    "too large for float32": (STEM, lambda v: v.double() + 1e300, r"(\d+) of \1 values are NaN or infinite"),
    "integers": (STEM, lambda v: v.int(), r"holds torch\.int32, expected floating-point numbers"),
    "booleans": (STEM, lambda v: v > 0, r"holds torch\.bool, expected floating-point numbers"),
    "complex numbers": (STEM, lambda v: v.cfloat(), r"holds torch\.complex64, expected floating-point numbers"),
    "a sparse tensor": (STEM, lambda v: v.to_sparse(), r"is a torch\.sparse_coo tensor"),
    "a negative variance": (VARIANCE, lambda v: -v - 1, r"(\d+) of \1 variances are negative"),
    "a negative count": (COUNT, lambda v: v - 1, r"is a count, got a negative number or a fraction"),
    "a fraction as a count": (COUNT, lambda v: v + 0.5, r"is a count, got a negative number or a fraction"),
}

ONLY_IN_TORCH = ("a sparse tensor", ".safetensors")  # this format has none


@pytest.mark.parametrize(
    ("name", "ending"),
    [(name, ending) for name in SPOILED for ending in (".pt", ".safetensors") if (name, ending) != ONLY_IN_TORCH],
)
def test_a_student_whose_weights_are_not_numbers_is_refused_by_tensor_and_count(
    name: str, ending: str, student_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor, spoil, message = SPOILED[name]
    path = tmp_path / f"s{ending}"
    spoiled = {**student_state, tensor: spoil(student_state[tensor])}
    if ending == ".pt":
        torch.save({"model_points": spoiled}, path)
    else:
        export_safetensors(path, spoiled)
    module = student(seed=5)
    fresh = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"s{ending}: {tensor}: {message}"):
        load_student(module, path)
    assert same(module, fresh)
    if "float32" not in name:  # an export keeps the file's type
        assert main(["export", str(path), "--format", "slidr"]) == 1
        assert tensor in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_converted_and_counts_stay_integers(
    dtype: torch.dtype, student_state: State, tmp_path: Path
) -> None:
    torch.save({name: value.to(dtype) for name, value in student_state.items()}, tmp_path / "s.pt")
    module = student()
    load_student(module, tmp_path / "s.pt")
    for name, value in module.state_dict().items():
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.equal(value, student_state[name].to(dtype).to(value.dtype)), name


def test_a_teacher_whose_weights_are_not_numbers_is_refused_by_tensor_and_count(tmp_path: Path) -> None:
    state = resnet18().state_dict()
    state["layer1.0.conv1.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(WeightsError, match=r"t\.pth: layer1\.0\.conv1\.weight: 9 of 36864 values are NaN or infinite"):
        build_teacher("ppkt_resnet18", weights=str(tmp_path / "t.pth"))


# ------------------------------------------------------------------------------------------------ odd files


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge"])
def test_what_is_not_a_file_of_reasonable_size_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(10 * 2**30)
    message = r"odd\.pt: (is a (FIFO|folder|device); expected a file|holds 10737418240 bytes)"
    with pytest.raises(WeightsError, match=message):
        load_student(student(), path)
    with pytest.raises(WeightsError, match=message):
        build_teacher("ppkt_resnet18", weights=str(path))


def test_a_tensor_that_claims_more_values_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(10**10)}, tmp_path / "huge.pt")
    with pytest.raises(WeightsError, match=r"huge\.pt: .*a tensor of shape \(10000000000,\) is larger than the file"):
        read_checkpoint(tmp_path / "huge.pt")


DEEP: Any = []
for _ in range(50):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("text", "config: expected keys with values, got str"),
        ([1, 2], "config: expected keys with values, got list"),
        ({"voxel_size": "wide"}, "voxel_size: expected one or three lengths from 0 .*got wide"),
        ({"voxel_size": [0.1, float("nan"), 0.1]}, "voxel_size: expected one or three lengths"),
        ({"voxel_size": [[0.1], 1.0, 0.1]}, "voxel_size: expected one or three lengths"),
        ({"voxel_size": 10**400}, "voxel_size: expected one or three lengths"),
        ({"data": {"voxel": 3}}, r"config: data\.voxel: expected keys with values, got int"),
        ({"data": {"voxel": {"cylindrical": "yes"}}}, "cylindrical_coordinates: expected true or false, got str"),
    ],
)
def test_a_config_of_another_type_is_refused_by_its_key(
    config: Any, message: str, student_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model_points": student_state, "config": config}, tmp_path / "s.pt")
    with pytest.raises(WeightsError, match=rf"s\.pt: .*{message}"):
        load_student(student(), tmp_path / "s.pt", expect=voxel_expectation(VoxelConfig()))
    assert main(["export", str(tmp_path / "s.pt"), "--format", "slidr"]) == 1
    assert "s.pt: config: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"config": {"a": DEEP}}, "config: is nested too deeply"),
        ({"config": {"a": {1: 2}}}, "config.a: has keys that are not text"),
        ({"config": {"a": torch.ones(1)}}, "config.a: holds a Tensor, which cannot be exported"),
        ({"epoch": "three"}, "epoch: expected a whole number from 0, got three"),
        ({"epoch": -1}, "epoch: expected a whole number from 0, got -1"),
    ],
)
@pytest.mark.parametrize("form", ["slidr", "safetensors"])
def test_metadata_that_cannot_be_exported_is_refused_by_its_key(
    form: str, entries: Any, message: str, student_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model_points": student_state, **entries}, tmp_path / "s.pt")
    assert main(["export", str(tmp_path / "s.pt"), "--format", form]) == 1
    assert f"s.pt: {message}" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]


def test_metadata_of_safetensors_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(SMALL, tmp_path / "s.safetensors", metadata={"config": "[" * 100_000 + "]" * 100_000})
    with pytest.raises(WeightsError, match=r"s\.safetensors: .*metadata is nested too deeply"):
        read_checkpoint(tmp_path / "s.safetensors")


# ------------------------------------------------------------------------------------------------ names and code


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("prefix", ["encoder_q.", "encoder.", "backbone.", "model_images.encoder.", ""])
def test_an_encoder_loads_from_every_prefix_trained_on_one_gpu_or_several(
    prefix: str, wrapper: str, tmp_path: Path
) -> None:
    source = resnet18().state_dict()
    state = prefixed(source, wrapper + prefix)
    if prefix == "encoder_q.":
        state |= prefixed({name: torch.zeros_like(v) for name, v in source.items()}, f"{wrapper}encoder_k.")
        state |= {f"{wrapper}queue": torch.ones(4, 8), f"{wrapper}encoder_q.fc.weight": torch.ones(2, 2)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "t.pth.tar")
    teacher = build_teacher("ppkt_resnet18", weights=str(tmp_path / "t.pth.tar"))
    assert same(teacher.encoder, source)
    state.pop(f"{wrapper}{prefix}layer1.0.conv1.weight")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "t.pth.tar")
    with pytest.raises(WeightsError, match=r"lacks what the model needs: 1 \(layer1\.0\.conv1\.weight\)"):
        build_teacher("ppkt_resnet18", weights=str(tmp_path / "t.pth.tar"))


@pytest.mark.parametrize("layout", ["container", "module", "module in a container", "state of a module beside code"])
def test_the_printed_lines_make_a_file_that_loads(
    layout: str, student_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it's a run.ckpt"
    module: nn.Module = student(seed=1)
    contents: Any = {
        "container": {"model": student_state, "args": Path("x"), "epoch": 3},
        "module": module,
        "module in a container": {"model": module, "optimizer": torch.optim.SGD(module.parameters()), "epoch": 3},
        "state of a module beside code": {
            "state_dict": prefixed(student_state, "model_points."),
            "callbacks": {Path: 1},
            "hyper_parameters": to_dict(Config()),
        },
    }[layout]
    torch.save(contents, path)
    with pytest.raises(WeightsError, match=r"refused: loading it would run [\w.]+") as refused:
        load_student(student(), path)
    printed = textwrap.dedent(str(refused.value).split("\n", 1)[1])
    monkeypatch.chdir(tmp_path)
    exec(printed, {})
    loaded = student(seed=7)
    load_student(loaded, tmp_path / "tensors-only.pt", expect=voxel_expectation(VoxelConfig()))
    assert same(loaded, student_state)


def test_the_lines_in_the_documentation_are_the_printed_ones(student_state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": student_state, "callbacks": {Path: 1}}, tmp_path / "lightning.ckpt")
    with pytest.raises(WeightsError) as refused:
        read_checkpoint(tmp_path / "lightning.ckpt")
    printed = textwrap.dedent(str(refused.value).split("\n", 1)[1]).replace(str(tmp_path) + "/", "").strip()
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    assert printed.replace("'lightning.ckpt'", '"lightning.ckpt"') in page


def test_the_digest_covers_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    export_safetensors(path, SMALL, 3, {"voxel_size": 0.1})
    assert read_checkpoint(path)["config"] == json.loads('{"voxel_size": 0.1}')
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2"))
    with pytest.raises(WeightsError, match="the digest in its metadata does not match"):
        student_state(read_checkpoint(path))
