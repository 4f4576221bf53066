"""Few steps of fine-tuning with a slow batch norm: the lag is told and kept; statistics taken again score better."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slidr.cluster.evaluate import evaluate
from slidr.cluster.finetune import finetune
from slidr.config import (
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    VoxelConfig,
)
from slidr.data.frames import write_frames
from slidr.data.nuscenes import read_frames


@pytest.fixture(scope="module")
def config(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("norms")
    write_frames(read_frames(tiny_world, "v1.0-trainval"), str(folder / "frames.parquet"))
    return Config(
        data=DataConfig(
            root=str(tiny_world), frames=str(folder / "frames.parquet"), voxel=VoxelConfig(size=(0.4, 2.0, 0.4))
        ),
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=17, bn_momentum=0.02),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(name="adamw", lr=1e-2, epochs=10, batch_size=2, schedule="constant"),
        run=RunConfig(folder=str(folder / "runs"), name="lagging", log_every=100),
        cluster=ClusterConfig(num_workers=0),
    )


@pytest.fixture(scope="module")
def lagging(config: Config) -> dict[str, Any]:
    with _Warnings() as said:
        return {**finetune(config, progress=False), "said": said.texts}


class _Warnings(logging.Handler):
    def __enter__(self) -> _Warnings:
        self.texts: list[str] = []
        logging.getLogger("slidr").addHandler(self)
        return self

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __exit__(self, *error: object) -> None:
        logging.getLogger("slidr").removeHandler(self)


def test_statistics_that_lag_are_told_with_what_to_do_and_kept_in_the_result(lagging: dict[str, Any]) -> None:
    found = lagging["norm_lag"]
    assert max(found["shift"], found["scale"]) > 0.5  # 0.98^20: two thirds of them are what random weights came with
    assert found["batches"] == 8
    assert lagging["reestimated_norms"] == 0
    [text] = [text for text in lagging["said"] if "running statistics lag behind" in text]
    assert found["layer"] in text
    assert "student.bn_momentum (now 0.02)" in text
    assert f"--checkpoint {lagging['student']} --evaluation.reestimate_norms 100" in text


def test_an_evaluation_with_statistics_taken_again_scores_better_and_is_another_run(
    config: Config, lagging: dict[str, Any]
) -> None:
    wanted = EvaluationConfig(checkpoint=lagging["student"], split="verify")
    plain = evaluate(replace(config, evaluation=wanted))
    again = evaluate(replace(config, evaluation=replace(wanted, reestimate_norms=8)))
    assert again["evaluation"]["miou"] > plain["evaluation"]["miou"] + 0.02
    assert plain["evaluation"]["miou"] == pytest.approx(lagging["val_miou"])
    assert plain["files"][0] != again["files"][0]
    assert "norms taken again over 8 batches" in Path(again["files"][1]).read_text()
    assert evaluate(replace(config, evaluation=replace(wanted, reestimate_norms=8))) == again


def test_fine_tuning_leaves_the_student_that_an_evaluation_would_make_of_it(
    config: Config, lagging: dict[str, Any]
) -> None:
    mended = replace(
        config, run=replace(config.run, name="mended"), evaluation=EvaluationConfig(reestimate_norms=8, split="verify")
    )
    with _Warnings() as said:
        result = finetune(mended, progress=False)
    assert not [text for text in said.texts if "lag behind" in text]
    assert result["reestimated_norms"] == 8
    assert result["norm_lag"] == lagging["norm_lag"]
    old, new = (torch.load(each["student"], weights_only=True)["model_points"] for each in (lagging, result))
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing == {name for name in old if name.rpartition(".")[2].startswith(("running_", "num_batches"))}
    wanted = EvaluationConfig(checkpoint=lagging["student"], split="verify", reestimate_norms=8)
    assert result["val_miou"] == pytest.approx(evaluate(replace(config, evaluation=wanted))["evaluation"]["miou"])


def test_a_frozen_backbone_keeps_the_statistics_that_its_last_layer_learned_on(config: Config) -> None:
    probe = replace(
        config,
        run=replace(config.run, name="probe"),
        student=replace(config.student, freeze=True),
        optim=replace(config.optim, max_steps=1),
        evaluation=EvaluationConfig(reestimate_norms=8),
    )
    result = finetune(probe, progress=False)
    assert (result["norm_lag"], result["reestimated_norms"]) == (None, 0)
