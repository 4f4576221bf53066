"""A folder of superpixel maps: what its parameters state, and which tokens can name a map."""

from __future__ import annotations

from pathlib import Path

import pytest

from slidr.data.label_maps import map_path, read_segments
from slidr.data.storage import DataError

# As the job wrote it at first.
WRITTEN = '{\n  "method": "slic",\n  "segments": 150,\n  "compactness": 6.0,\n  "sigma": 3.0\n}'


def test_the_parameters_state_how_many_superpixels_were_asked_for(tmp_path: Path) -> None:
    assert read_segments(str(tmp_path)) is None
    (tmp_path / "parameters.json").write_text(WRITTEN)
    assert read_segments(str(tmp_path)) == 150


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not readable JSON"),
        (WRITTEN[:-9], "is not readable JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("null", "expected a JSON object, got NoneType"),
        (WRITTEN.replace("segments", "segmentz"), "key 'segments' is missing"),
        (WRITTEN.replace("150", "true"), "segments: expected int, got True"),
        (WRITTEN.replace("150", '"150"'), "segments: expected int, got '150'"),
        (WRITTEN.replace("150", "-150"), "segments: expected at least 1, got -150"),
    ],
)
def test_damaged_parameters_are_refused_by_name_with_the_way_on(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "parameters.json").write_text(text)
    with pytest.raises(DataError, match=r"parameters\.json: .*slidr superpixels CONFIG") as found:
        read_segments(str(tmp_path))
    assert reason in str(found.value)


@pytest.mark.parametrize("token", ["", ".", "..", ".tmp-x", "a/b", "../a", "a\\b", "a\nb", "a\0b", "x" * 201, "a?b"])
def test_a_token_that_is_not_a_plain_file_name_names_no_map(tmp_path: Path, token: str) -> None:
    with pytest.raises(DataError, match="image token"):
        map_path(str(tmp_path), token)


@pytest.mark.parametrize("token", ["7cbd44b0e2a34fc9b7f6cd1b2a5ef1f0", "CAM 1 (left)", "kamera-ü", "x" * 200])
def test_a_token_that_names_a_file_names_a_map(tmp_path: Path, token: str) -> None:
    path = Path(map_path(str(tmp_path), token))
    path.write_bytes(b"")
    assert [file.name for file in tmp_path.iterdir()] == [f"{token}.png"]
