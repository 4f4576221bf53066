"""The Dockerfile's steps without docker: COPY into a scratch folder, RUN in a fresh virtual environment, then trials.

    python tools/container_steps.py [--keep FOLDER]

What belongs to the system (apt-get, useradd) is printed and left out. Takes minutes: it installs every locked package.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = ("apt-get ", "useradd ")
# What the image must be able to do: know its packages, and run a job, of which Ray's workers and the token are a part.
WORLD = "--parametrize 1 --verify 1 --val 1 --keyframes 1 --scale 0.1"
DATA = "--data.root world --data.frames frames.parquet --superpixels.folder superpixels"
TRIALS = (
    "slidr doctor",
    "slidr pretrain configs/demo.yaml --help",
    f"slidr synthesize world {WORLD}",
    f"slidr frames configs/demo.yaml {DATA}",
    f"python jobs/superpixels.py configs/demo.yaml {DATA}",
)


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of each step, in order; continued lines joined, comments left out."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined if line.strip())]


def copy(arguments: str, context: Path, workdir: Path) -> None:
    """COPY: files into a folder, or one folder's content into another."""
    *sources, target = shlex.split(arguments)
    for source in sources:
        if (context / source).is_dir():
            shutil.copytree(context / source, workdir / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(context / source, workdir / target)


def perform(scratch: Path) -> None:
    """Runs every step; raises `CalledProcessError` where one fails."""
    subprocess.run([sys.executable, "-m", "venv", scratch / "venv"], check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{scratch / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    workdir = scratch
    for instruction, arguments in steps((ROOT / "Dockerfile").read_text()):
        start = time.monotonic()
        skipped = instruction == "RUN" and arguments.startswith(SYSTEM)
        if instruction == "WORKDIR":
            workdir = scratch / arguments.lstrip("/")
            workdir.mkdir(parents=True)
        elif instruction == "COPY":
            copy(arguments, ROOT, workdir)
        elif instruction == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(arguments))
        elif instruction == "RUN" and not skipped:
            subprocess.run(arguments, shell=True, check=True, cwd=workdir, env=environment, stdout=subprocess.DEVNULL)
        else:
            skipped = True
        print(
            f"{'left out' if skipped else f'{time.monotonic() - start:6.1f} s'}  {instruction} {arguments}", flush=True
        )
    # A home of its own, as the container's user has: Ray keeps the token there.
    (scratch / "home").mkdir()
    environment["HOME"] = str(scratch / "home")
    for trial in TRIALS:
        subprocess.run(shlex.split(trial), check=True, cwd=workdir, env=environment, stdout=subprocess.DEVNULL)
        print(f"     works  {trial}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="do it in this new folder and leave it there")
    arguments = parser.parse_args()
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True)
        perform(arguments.keep.resolve())
        return
    with tempfile.TemporaryDirectory() as scratch:
        perform(Path(scratch))


if __name__ == "__main__":
    main()
