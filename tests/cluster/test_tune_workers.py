"""A search whose trials are Ray Train runs of two workers, beside the same search in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tune_cases import one_thread, search_config

from slidr.cluster.tune import search

__all__ = ["one_thread"]


@pytest.mark.ray
def test_trials_of_two_workers_find_what_trials_of_one_process_find(
    tiny_world: Path, ray_cluster: None, tmp_path: Path
) -> None:
    config = search_config(tiny_world, tmp_path)
    # Gently: batch norm's sums meet in another order, and large steps blow rounding up.
    space = replace(config.tune.random, lr=(1e-4, 1e-3))
    config = replace(
        config,
        student=replace(config.student, weights=None),
        optim=replace(config.optim, epochs=1),
        tune=replace(config.tune, fractions=(1.0,), methods=("random",), trials=1, random=space),
    )
    alone = search(config)
    together = search(
        replace(
            config,
            run=replace(config.run, name="together"),
            cluster=replace(config.cluster, num_workers=2),
            tune=replace(config.tune, results=str(tmp_path / "together")),
        )
    )
    expected, found = (pq.read_table(result["files"][0]).to_pylist() for result in (alone, together))
    assert [row["kind"] for row in found] == ["trial", "final"]
    for one, other in zip(expected, found, strict=True):
        assert (other["status"], other["steps"], other["lr"]) == ("finished", one["steps"], one["lr"])
        assert other["score"] == pytest.approx(one["score"], abs=5e-3)
