"""Runs that were started before a key existed go on, whatever the key says now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slidr.config import MissingFiles, load
from slidr.training.runs import RunError, claim, folder_of

GOLDEN = Path(__file__).parents[1] / "golden" / "schema1" / "configs"


@pytest.mark.parametrize("allow_missing", [None, "cameras"])
@pytest.mark.parametrize("name", ["pretrain/slidr_minkunet.yaml", "finetune/nuscenes_1pct.yaml"])
def test_a_run_whose_config_lacks_a_later_key_is_resumed(
    tmp_path: Path, name: str, allow_missing: MissingFiles | None
) -> None:
    text = (GOLDEN / name).read_text()
    assert "allow_missing" not in text
    config = load(GOLDEN / name)
    config = replace(config, run=replace(config.run, folder=str(tmp_path), resume=True))
    folder = folder_of(config)
    Path(folder.path).mkdir(parents=True)
    Path(folder.file("config.yaml")).write_text(text)
    folder.finish({"steps": 1, "epochs": 1})
    now = replace(config, data=replace(config.data, allow_missing=allow_missing))
    assert claim(now).path == folder.path
    with pytest.raises(RunError, match=r"data\.train_fraction was"):
        claim(replace(now, data=replace(now.data, train_fraction=0.5)))
