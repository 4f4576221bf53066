"""Checkpoints with damaged bytes, entries or values: none is used, and the newest intact one before it is."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_bytes import damage
from toy_run import STEP, equal, expected, trained, two_checkpoints

from slidr.data.storage import DataError
from slidr.training import checkpoint
from slidr.training.checkpoint import CheckpointError, CheckpointFolder

State = dict[str, Any]


def test_a_damaged_checkpoint_is_refused_or_holds_every_value_unchanged(tmp_path: Path) -> None:
    path = tmp_path / f"step-{STEP:08d}.pt"
    checkpoint.write(str(path), trained())
    whole, intact = path.read_bytes(), checkpoint.read(str(path))
    refusals = []
    for seed in range(300):
        path.write_bytes(damage(whole, random.Random(seed)))
        try:
            state = checkpoint.read(str(path))
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert equal(state, intact), f"seed {seed}: a damaged checkpoint was read with other values"
    assert len(refusals) > 150  # padding between entries is most of the rest
    assert all(str(path) in message for message in refusals)


def test_damage_to_any_bit_of_the_directory_changes_no_value(tmp_path: Path) -> None:
    path = tmp_path / f"step-{STEP:08d}.pt"
    checkpoint.write(str(path), trained())
    whole, intact = path.read_bytes(), checkpoint.read(str(path))
    directory = whole.index(b"PK\x01\x02")
    for at in range(directory, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert equal(checkpoint.read(str(path)), intact), f"byte {at}"
        except CheckpointError:
            continue


def test_the_newest_intact_checkpoint_is_used_after_a_flipped_bit_in_a_weight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = two_checkpoints(tmp_path, lambda state: None)
    path = tmp_path / f"step-{STEP:08d}.pt"
    whole = path.read_bytes()
    at = whole.index(trained()["student"]["0.weight"].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    state = checkpoints.newest(expected().misfit)
    assert state is not None
    assert state["step"] == STEP - 1
    assert f"{path}: not a readable checkpoint" in caplog.text
    assert "checksum" in caplog.text


def test_values_are_looked_at_where_no_run_is_known(tmp_path: Path) -> None:
    checkpoints = two_checkpoints(tmp_path, put("student", "0.weight")(not_a_number))
    with pytest.raises(CheckpointError, match=r"student: 0\.weight: 1 of 24 values are NaN"):
        checkpoints.read(STEP)


def put(*keys: Any) -> Callable[[Any], Callable[[State], None]]:
    """A function that makes functions which put a value at `keys`."""

    def making(value: Any) -> Callable[[State], None]:
        def spoil(state: State) -> None:
            for key in keys[:-1]:
                state = state[key]
            state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

        return spoil

    return making


def drop(*keys: Any) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return spoil


def not_a_number(value: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(value.numel()).view(value.shape) == 1, torch.nan, value)


ENTRIES = ("kind", "student", "optimizer", "scaler", "step", "epoch", "config", "metrics", "best")
SPOILED: dict[str, tuple[Callable[[State], None], str]] = {
    **{f"without {name}": (drop(name), f"lacks the entry '{name}'") for name in ENTRIES},
    "without a weight": (drop("student", "0.weight"), r"student: 0\.weight is in one of"),
    "a weight more": (put("student", "9.weight")(torch.ones(1)), r"student: 9\.weight is in one of"),
    "a student that is a list": (put("student")([1]), "student: is list"),
    "a student with text": (put("student", "0.bias")("text"), "student: is not a dict of names and tensors"),
    "a weight of another shape": (put("student", "0.weight")(torch.ones(3, 8)), r"0\.weight is .* of shape \(3, 8\)"),
    "a weight of another type": (put("student", "0.bias")(lambda v: v.double()), r"0\.bias is torch\.float64"),
    "complex weights": (put("student", "0.bias")(lambda v: v.cfloat()), r"0\.bias: holds torch\.complex64"),
    "integer weights": (put("student", "0.bias")(lambda v: v.int()), r"0\.bias: holds torch\.int32"),
    "a fraction as a count": (
        put("student", "1.num_batches_tracked")(torch.tensor(0.5)),
        r"num_batches_tracked: is a count",
    ),
    "a weight that is NaN": (put("student", "0.weight")(not_a_number), r"0\.weight: 1 of 24 values are NaN or inf"),
    "infinite weights": (put("student", "2.bias")(torch.full((2,), torch.inf)), r"2\.bias: 2 of 2 values"),
    "a negative variance": (put("student", "1.running_var")(-torch.ones(8)), "8 of 8 variances are negative"),
    "a step that is text": (put("step")("6"), "step: is str"),
    "a step that is true": (put("step")(True), "step: is bool"),
    "a negative step": (put("step")(-6), "step -6"),
    "a huge step": (put("step")(10**18), "step 10{18}"),
    "another step than the name's": (put("step")(7), "is the checkpoint of step 7, by its contents"),
    "more epochs than steps": (put("epoch")(7), "step 6 and epoch 7"),
    "a best that is NaN": (put("best")(float("nan")), "best: is nan"),
    "a metric that is infinite": (put("metrics", "loss")(float("inf")), "metrics: loss is inf"),
    "another kind of training": (put("kind")("evaluate"), "kind: is 'evaluate', the run is 'toy'"),
    "no parameter groups": (drop("optimizer", "param_groups"), "optimizer: lacks param_groups or state"),
    "an optimizer of another network": (
        put("optimizer", "param_groups", 0, "params")([0, 1]),
        "group 0 holds other parameters",
    ),
    "two groups": (put("optimizer", "param_groups")(lambda groups: groups * 2), "holds 2 groups"),
    "no peak rate": (drop("optimizer", "param_groups", 0, "peak_lr"), "group 0 lacks peak_lr"),
    "a rate that is NaN": (put("optimizer", "param_groups", 0, "lr")(float("nan")), "lr is nan"),
    "betas that are text": (put("optimizer", "param_groups", 0, "betas")("0.9"), "betas is '0.9'"),
    "a parameter's number that is none": (put("optimizer", "state", "x")({}), "state of parameter x"),
    "a moment missing": (drop("optimizer", "state", 0, "exp_avg"), "expected the entries exp_avg, exp_avg_sq, step"),
    "a moment of another shape": (put("optimizer", "state", 0, "exp_avg")(torch.ones(2)), r"exp_avg: expected a tens"),
    "a moment that is NaN": (put("optimizer", "state", 1, "exp_avg_sq")(not_a_number), r"shape \(8,\): 1 of 8 values"),
    "a negative square": (put("optimizer", "state", 1, "exp_avg_sq")(-torch.ones(8)), "holds negative squares"),
    "a negative step of a moment": (put("optimizer", "state", 0, "step")(torch.tensor(-1.0)), r"step: is -1\.0"),
    "a huge step of a moment": (put("optimizer", "state", 0, "step")(torch.tensor(1e30)), r"step: is 1.*e\+30"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_with_spoiled_entries_is_passed_over_for_the_one_before(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, message = SPOILED[name]
    checkpoints = two_checkpoints(tmp_path, spoil)
    state = checkpoints.newest(expected().misfit)
    assert state is not None
    assert state["step"] == STEP - 1
    assert f"step-{STEP:08d}.pt" in caplog.text
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(STEP, expected().misfit)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_intact_checkpoint_fits_its_run(optimizer: str, tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(str(tmp_path))
    checkpoints.save(trained(optimizer))
    state = checkpoints.newest(expected(optimizer).misfit)
    assert state is not None
    assert equal({"format": 1, **trained(optimizer)}, state)
    other = {"sgd": "adamw", "adamw": "sgd"}[optimizer]
    with pytest.raises(CheckpointError, match="state of parameter 0: expected the entries"):
        checkpoints.read(STEP, expected(other).misfit)


def test_a_gradient_scaler_that_is_in_use_must_have_its_numbers(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(str(tmp_path))
    scaler = torch.amp.GradScaler("cpu").state_dict()
    for saved, fits in ((scaler, True), ({}, False), ({**scaler, "scale": float("inf")}, False)):
        checkpoints.save({**trained(), "scaler": saved})
        if fits:
            assert checkpoints.read(STEP, expected(scaler=scaler).misfit)["scaler"] == scaler
        else:
            with pytest.raises(CheckpointError, match="scaler: scale is"):
                checkpoints.read(STEP, expected(scaler=scaler).misfit)


def test_the_best_checkpoint_is_looked_at_in_the_same_way(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(str(tmp_path))
    assert checkpoints.best() is None
    path = Path(checkpoints.save_best(trained()))
    assert checkpoints.best(expected().misfit) is not None
    whole = path.read_bytes()
    at = whole.index(trained()["student"]["0.weight"].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    with pytest.raises(CheckpointError, match=r"best\.pt: not a readable checkpoint"):
        checkpoints.best()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge"])
def test_what_is_not_a_file_of_reasonable_size_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    checkpoints = two_checkpoints(tmp_path, lambda state: None)
    path = tmp_path / f"step-{STEP:08d}.pt"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(10 * 2**30)
    with pytest.raises(DataError, match=rf"{path.name}: (is a (FIFO|folder|device)|holds \d+ bytes)"):
        checkpoints.read(STEP)
    state = checkpoints.newest()
    assert state is not None
    assert state["step"] == STEP - 1


def test_compressed_entries_that_unpack_to_more_than_memory_should_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"step-{STEP:08d}.pt"
    buffer = io.BytesIO()
    torch.save({"format": 1, "student": {"w": torch.zeros(2**20)}}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr("slidr.models.archive.INFLATED_BYTES", 2**20)
    with pytest.raises(CheckpointError, match=r"its entries unpack to 4\d+ bytes, more than the 1048576"):
        checkpoint.read(str(path))
