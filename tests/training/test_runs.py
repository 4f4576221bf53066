"""Taking up a run again: with which values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slidr.config import Config, LossConfig, RunConfig
from slidr.data import storage
from slidr.training.runs import RunError, claim, of_the_workers


def test_a_run_is_resumed_with_another_number_of_workers_but_with_no_other_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def of(workers: int | tuple[int, int], lr: float = 0.5) -> Config:
        config = Config(run=RunConfig(folder=str(tmp_path), name="run", resume=True))
        cluster = replace(config.cluster, num_workers=workers)
        return replace(config, cluster=cluster, optim=replace(config.optim, lr=lr))

    claim(of(2)).checkpoints.save({"step": 3})
    claim(of(2))
    assert not caplog.messages
    for workers in (1, (1, 2)):
        assert claim(of(workers)).checkpoints.steps() == [3]
        assert f"was started with cluster.num_workers 2 and is resumed with {workers}: " in caplog.messages[-1]
        assert "the loss is another one" in caplog.messages[-1]
    with pytest.raises(RunError, match=r"other values: optim\.lr was 0\.5, now 0\.25; resume"):
        claim(of(1, lr=0.25))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (LossConfig(gather_negatives=True), "rounded in another order"),
        (LossConfig(gather_negatives=False), "negatives are those of its worker's frames"),
        (LossConfig(names=("point_pixel_info_nce",), gather_negatives=True), "draws its own pairs"),
        (LossConfig(names=("cross_entropy_lovasz",)), "mean of each worker's own"),
    ],
)
def test_what_another_number_of_workers_changes_is_said(loss: LossConfig, said: str) -> None:
    assert said in of_the_workers(Config(loss=loss))


def test_a_run_without_a_checkpoint_that_is_started_with_other_values_leaves_its_mlflow_run_and_metrics_behind(
    tmp_path: Path,
) -> None:
    def start(lr: float, resume: bool = False) -> list[str]:
        config = Config(run=RunConfig(folder=str(tmp_path), name="run", resume=resume))
        folder = claim(replace(config, optim=replace(config.optim, lr=lr)))
        return [name for name in left if storage.exists(folder.file(name))]

    left = ["mlflow_run_id", "metrics.jsonl", "metrics.jsonl.sent"]
    assert start(0.5) == []
    for name in left:
        (tmp_path / "run" / name).write_text("")
    assert start(0.5) == start(0.5, resume=True) == left  # the same run again
    assert start(0.25) == []
    for name in left:
        (tmp_path / "run" / name).write_text("")
    assert start(0.125, resume=True) == []
    (tmp_path / "run" / "mlflow_run_id").write_text("")
    (tmp_path / "run" / "config.yaml").write_text("optim: {a_key_of_another_version: 1}")
    assert start(0.125) == []
