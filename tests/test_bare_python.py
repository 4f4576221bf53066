"""What runs where only torch and numpy are installed: everything that a training step needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The one place for a package of their own, and run folders, which read frame tables. All others import without any.
OTHERS = {
    *("ops/superpixels", "ops/slic_kernels", "sparse/minkowski", "sparse/triton_kernels"),
    *("training/runs", "training/locks"),
}
PROGRAM = """
import importlib, sys
from pathlib import Path
import bare
bare.hide()
names = sys.argv[1:]
for name in names:
    importlib.import_module(name)
from slidr.shapes import Float
from torch import Tensor
assert Float[Tensor, "N 3"] is Tensor
print(len(names))
"""


def test_a_training_step_imports_with_torch_and_numpy_alone() -> None:
    rooms = ("types", "shapes", "config", "ops", "sparse", "losses", "metrics", "models", "training", "planning/costs")
    files = sorted(path.relative_to(ROOT / "slidr").with_suffix("").as_posix() for path in ROOT.glob("slidr/**/*.py"))
    names = [
        f"slidr.{file.replace('/', '.')}".removesuffix(".__init__")
        for file in files
        if file not in OTHERS and any(file == room or file.startswith(f"{room}/") for room in rooms)
    ]
    assert len(names) > 30
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", PROGRAM, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(names)
