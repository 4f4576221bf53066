"""Everything about a GPU in one command and at most six minutes: is it right, how fast is it, what limits it?

    python benchmarks/gpu.py [--parts all] [--minutes 6] [--json results/gpu.json] [--costs results/gpu_costs.json]

Needs torch and numpy; Triton, Pillow, spconv and spconv-triton add rows where they can be imported. slidr need not be
installed. --parts takes groups (correct, time, loader) and single sections (benchmarks/gpu_parts/sections.py). The
sections run in a child process, in order; one that fails, or that no longer fits into --minutes, is a row that says so,
and the rest goes on, in a new process where the GPU answers no more. A short table comes last; --json holds all
numbers. --costs holds unit costs: `slidr plan CONFIG --costs FILE` then answers in GPU-hours. Without a GPU the CPU's
column is filled, and the rest says so.

The exit status is 1 where a result is wrong or a section failed, otherwise 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_parts.rows import Channel, Row, table  # noqa: E402
from gpu_parts.sections import chosen  # noqa: E402

GRACE_S = 10.0  # after the last second; what has not ended then is killed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="all", help="sections and groups, separated by commas")
    parser.add_argument("--minutes", type=float, default=6.0, help="time for everything")
    parser.add_argument(
        "--small", action="store_true", help="tiny clouds, images and networks: a try-out, no measurement"
    )
    parser.add_argument("--root", type=Path, help="a nuScenes root: its first sweep instead of a made-up street")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "gpu.json", help="all numbers")
    parser.add_argument("--costs", type=Path, help="unit costs for `slidr plan --costs`; those in the file are kept")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.names = chosen(options.parts)
    except ValueError as error:
        parser.error(str(error))
    if not options.minutes > 0:
        parser.error(f"--minutes: got {options.minutes}, expected a positive number")
    if options.root is not None and not (options.root / "samples" / "LIDAR_TOP").is_dir():
        parser.error(f"--root: {options.root} has no samples/LIDAR_TOP; pass the folder that holds samples/")
    return options


def run_in_children(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Everything that child processes send while they run the sections, and a row for each that one of them died in."""
    deadline, names = time.time() + 60 * options.minutes, list(options.names)
    messages: list[tuple[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        while names:
            channel = Channel(Path(folder, f"{len(messages)}.jsonl"))
            ended = _child(options, names, deadline, channel)
            received = channel.received()
            messages += received
            begun = [value for kind, value in received if kind == "begin"]
            finished = [value[0] for kind, value in received if kind == "end"]
            died_in = [name for name in begun if name not in finished]
            names = [name for name in names if name not in begun]
            if ended == 0:
                break
            if died_in or not begun:
                name = died_in[0] if died_in else names.pop(0)
                messages.append(("row", Row(name, "failed", note=f"its process {_how(ended)}", state="failed")))
    return messages


def _child(options: argparse.Namespace, names: list[str], deadline: float, channel: Channel) -> int | None:
    """The exit status of a process that runs the sections; None where it had to be killed."""
    command = [sys.executable, __file__, "--child", str(channel.path), "--parts", ",".join(names)]
    command += ["--deadline", str(deadline), *(["--small"] if options.small else [])]
    command += ["--root", str(options.root)] if options.root is not None else []
    with subprocess.Popen(command) as process:
        try:
            return process.wait(max(deadline - time.time(), 0) + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return None


def _how(status: int | None) -> str:
    if status is None:
        return "did not end in time and was killed"
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def report(options: argparse.Namespace, messages: list[tuple[str, Any]], seconds: float) -> int:
    """Writes the files, prints the table; returns the exit status."""
    rows = [value for kind, value in messages if kind == "row"]
    machine: dict[str, Any] = next((value for kind, value in messages if kind == "machine"), {})
    costs = [value for kind, value in messages if kind == "cost"]
    result = {
        "benchmark": "gpu",
        "small": options.small,
        "machine": machine,
        "minutes": seconds / 60,
        "seconds_of": dict(value for kind, value in messages if kind == "end"),
        "rows": [vars(row) for row in rows],
        "costs": costs,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    size = "a try-out at a tiny size, " if options.small else ""
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("python", "torch", "triton", "numpy"))
    print(table(rows, f"\n{machine.get('gpu')}; {machine.get('cpu')}, {machine.get('cores')} cores; {versions}"))
    print(f"{size}{seconds / 60:.1f} minutes, {machine.get('date')}; all numbers: {options.json}")
    if options.costs is not None:
        print(write_costs(options.costs, costs, machine))
    return 1 if any(row.state in ("wrong", "failed") for row in rows) else 0


def write_costs(path: Path, entries: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Adds unit costs to a file of them; returns a sentence that says so."""
    from slidr.planning.costs import Costs, UnitCost, read_costs, write_costs

    if not entries:
        return f"{path}: not written: this run measured no unit costs; they come from `step` and `loader` at full size"
    made = [
        UnitCost(**entry, machine=f"{machine['gpu']}, torch {machine['torch']}", date=machine["date"], command=COMMAND)
        for entry in entries
    ]
    before = read_costs(path) if path.exists() else Costs()
    write_costs(path, before.plus(made))
    return f"{path}: {len(made)} unit costs; use them with `slidr plan CONFIG --costs {path}`"


COMMAND = "python benchmarks/gpu.py"


def main() -> int:
    options = parse()
    if options.child is not None:
        from gpu_parts import child

        return child.run(options.names, options.deadline, options.small, options.root, Channel(options.child))
    started = time.time()
    messages = run_in_children(options)
    return report(options, messages, time.time() - started)


if __name__ == "__main__":
    sys.exit(main())
