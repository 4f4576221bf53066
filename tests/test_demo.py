"""The demo at its smallest: every stage runs, leaves its results, and is skipped the second time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slidr.config import Config, DemoConfig, VoxelConfig, WorldConfig, load
from slidr.demo import run_demo

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def tiny(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("demo")
    config = load(ROOT / "configs" / "demo.yaml")
    return replace(
        config,
        data=replace(
            config.data,
            root=str(folder / "world"),
            frames=str(folder / "frames.parquet"),
            image_size=(56, 104),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
        ),
        superpixels=replace(config.superpixels, folder=str(folder / "superpixels"), segments=40),
        student=replace(config.student, width=0.25),
        optim=replace(config.optim, max_steps=2),
        run=replace(config.run, folder=str(folder / "runs"), score_frames=1),
        cluster=replace(config.cluster, num_workers=0),
        world=WorldConfig(parametrize=1, verify=1, val=1, keyframes=2, scale=0.1),
        demo=DemoConfig(seeds=(0, 3), probe_steps=1, scene_steps=1),
    )


@pytest.fixture(scope="module")
def first(tiny: Config) -> dict[str, Any]:
    return run_demo(tiny)


def test_scores_and_counts_are_written(tiny: Config, first: dict[str, Any]) -> None:
    written = json.loads(Path(tiny.run.folder, "demo", "results.json").read_text())
    assert written == first
    assert first["frames"] == 3 * 2
    assert first["superpixel_maps"] == 2 * 2 * 6  # the scenes that are trained and validated on
    assert first["steps"] == 2
    assert Path(tiny.run.folder, "demo", "method.png").stat().st_size > 10_000


def test_the_last_stage_scores_every_arm_with_every_seed(tiny: Config, first: dict[str, Any]) -> None:
    assert [row["steps"] for row in first["few_labels"]] == [1, 1]
    for row in first["few_labels"]:
        assert len(row["pretrained"]) == len(row["random init"]) == 2
        assert row["pretrained"] != row["random init"]  # another start, another network
        assert all(0 <= score <= 100 for score in row["pretrained"] + row["random init"])


def test_a_second_run_skips_what_is_done_and_says_so(
    tiny: Config, first: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = {path: path.stat().st_mtime_ns for path in Path(tiny.data.root).rglob("*.jpg")}
    again = run_demo(tiny)
    said = capsys.readouterr().err
    assert "is there already, skipped" in said
    assert "24 there already" in said
    assert "finished already, skipped" in said
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert again["retrieval"] == first["retrieval"]


def test_the_front_page_shows_real_output_and_pictures() -> None:
    text = (ROOT / "README.md").read_text()
    assert "DEMO_OUTPUT" not in text
    assert "superpixel retrieval" in text
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert local
    for link in local:
        assert (ROOT / link).exists(), link
