"""Weight files: what is read, what is refused, how they are written."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from slidr.models.files import WeightsError, read_checkpoint, replacing, write_checkpoint


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
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"w": torch.ones(1)})

    def crash_half_way() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash_half_way()
    assert torch.equal(read_checkpoint(path)["w"], torch.ones(1))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_whose_reading_fails_is_named() -> None:
    with pytest.raises(WeightsError, match=r"^/proc/self/mem: cannot be read \("):
        read_checkpoint("/proc/self/mem")
