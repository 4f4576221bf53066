"""What `ray job submit` runs: each a script that stands in no package and finds its command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def test_every_job_runs_as_a_script_and_explains_its_command(tmp_path: Path) -> None:
    assert [job.stem for job in JOBS] == ["evaluate", "finetune", "pretrain", "superpixels", "tune"]
    # As the package would be installed: found whatever the working folder is.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = {
        job: subprocess.Popen(
            [sys.executable, str(job), "--help"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for job in JOBS
    }
    for job, process in started.items():
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, job
        assert f"usage: slidr {job.stem} CONFIG" in printed
