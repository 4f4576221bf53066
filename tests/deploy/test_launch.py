"""docs/cluster.md's shortest way, done as written: a cluster by `ray start --head`, its jobs by `ray job submit`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/net").exists(), reason="asks Linux whose process is whose")
ROOT = Path(__file__).parents[2]
HEADING = "## One machine, as a cluster"
# What the page's commands get besides, to take seconds, and to leave other clusters of this machine alone.
WORLD = "--parametrize 2 --verify 1 --val 1 --keyframes 2 --scale 0.1"
SMALL = (
    "--superpixels.segments 40 --data.image_size 56 104 --data.voxel.size 0.4 2.0 0.4 --student.width 0.25 "
    "--optim.max_steps 2 --optim.batch_size 1 --data.max_val_frames 1 --run.score_frames 1"
)
IMAGES = (2 + 1) * 2 * 6  # of parametrize and verify
MARK = "this is the code of"


def documented() -> list[str]:
    """The page's commands, one a line: continued lines joined, comments left out."""
    section = (ROOT / "docs" / "cluster.md").read_text().partition(HEADING)[2]
    (block,) = re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    text = re.sub(r"\s+#.*", "", block)
    text = re.sub(r'(DATA="[^"]*")', lambda match: " ".join(match[1].split()), text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def one(commands: list[str], start: str) -> str:
    """The only command that begins so."""
    (found,) = [line for line in commands if line.startswith(start)]
    return found


@dataclass
class Launched:
    """A running cluster, and what talks to it."""

    process: subprocess.Popen[bytes]
    tree: Path  # the working folder of the one who submits
    dashboard: int
    environment: dict[str, str]
    commands: list[str]

    def shell(self, *commands: str) -> subprocess.CompletedProcess[str]:
        """Runs commands of the page in one shell, after its exports; both streams together in `stdout`."""
        exports = [line for line in self.commands if line.startswith(("export ", "DATA="))]
        exports += [f"export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{self.dashboard}"]
        return subprocess.run(
            ["bash", "-e", "-c", "\n".join([*exports, *commands])],
            cwd=self.tree,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def working_tree(target: Path) -> Path:
    """A copy of what `ray job submit --working-dir .` sends, whose package says where it was imported from."""
    for name in ("slidr", "jobs", "configs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", target)
    with (target / "slidr" / "__init__.py").open("a") as file:
        file.write(f'\nprint("{MARK}", __file__)\n')
    return target


@pytest.fixture(scope="module")
def launched() -> Iterator[Launched]:
    """The page up to `ray start`, which stays in the foreground of a process of ours."""
    scratch = Path(tempfile.mkdtemp(prefix="slidr-"))  # short: the names of Unix sockets are
    commands = documented()
    gcs, dashboard, agent, client = free_ports(4)
    kept = ("RAY_worker_niceness",)  # what a busy machine may need
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in kept}
    environment |= {
        "HOME": str(scratch),  # the token goes there
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # as `make install` does, whichever tree this environment was made in
    }
    start = (
        f"{one(commands, 'ray start')} --block --num-cpus=2 --port={gcs} --dashboard-port={dashboard} "
        f"--dashboard-agent-listen-port={agent} --ray-client-server-port={client} --temp-dir={scratch}/ray"
    )
    before = [line for line in commands if line.startswith(("(umask", "export RAY_AUTH", "export RAY_ENA"))]
    log = (scratch / "start.log").open("w")
    process = subprocess.Popen(
        ["bash", "-e", "-c", "\n".join([*before, f"exec {start}"])],
        env=environment,
        cwd=scratch,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        made = Launched(process, working_tree(scratch / "tree"), dashboard, environment, commands)
        _wait_for_agent(made, agent, scratch / "start.log")
        yield made
    finally:
        members = family(process.pid)  # before it goes: orphans have no parent to be found by
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        for pid in members & running().keys():  # workers have groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


def running() -> dict[int, int]:
    """Every process of this machine that has not ended, and its parent."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(folder.name)] = int(parent)
    return found


def family(pid: int) -> set[int]:
    """A process and all below it."""
    parents, inside = running(), {pid}
    while more := {child for child, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return inside


def _wait_for_agent(made: Launched, port: int, log: Path) -> None:
    """Jobs are taken once the head's agent listens."""
    for _ in range(600):
        assert made.process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no agent after a minute: {log.read_text()}")


def test_the_page_has_only_commands_that_are_tried_here() -> None:
    tried = ("make install", "(umask", "export RAY_", "ray start", "DATA=", "slidr ", "ray job submit")
    assert [line for line in documented() if not line.startswith(tried)] == ["ray stop"]
    assert [re.findall(r"jobs/(\w+)\.py", line) for line in documented() if line.startswith("ray job")] == [
        ["superpixels"], ["pretrain"],
    ]  # fmt: skip


def test_superpixels_then_pretraining_as_submitted_jobs(launched: Launched) -> None:
    commands = launched.commands
    prepared = launched.shell(f"{one(commands, 'slidr synthesize')} {WORLD}", one(commands, "slidr frames"))
    assert prepared.returncode == 0, prepared.stdout
    superpixels, pretraining = (f"{line} {SMALL}" for line in commands if line.startswith("ray job submit"))

    cut = launched.shell(superpixels)
    assert cut.returncode == 0, cut.stdout
    assert f"superpixels: {IMAGES} computed, 0 there already" in cut.stdout
    (manifest,) = launched.tree.glob("data/demo/superpixels/*/manifest.json")
    assert json.loads(manifest.read_text()) == {"images": IMAGES, "maps": IMAGES, "failed": {}}
    # The job ran the submitted code, not the one that is installed where the cluster runs.
    (imported,) = set(re.findall(rf"{MARK} (\S+)", cut.stdout))
    assert "working_dir_files" in imported

    trained = launched.shell(pretraining)
    assert trained.returncode == 0, trained.stdout
    folder = launched.tree / "runs" / "job"
    assert f"student -> {folder}/student.pt" in trained.stdout
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    assert (folder / "student.pt").stat().st_size > 0


def test_a_job_that_cannot_succeed_ends_with_the_reason_and_a_status_for_scripts(launched: Launched) -> None:
    job = "ray job submit --working-dir . -- python jobs/pretrain.py configs/demo.yaml --data.frames /nowhere.parquet"
    refused = launched.shell(job)
    assert refused.returncode == 1
    assert "/nowhere.parquet: there is no frame table" in refused.stdout
    assert "next: slidr frames CONFIG" in refused.stdout
    # The default run.folder, in the folder that Ray unpacked the job into.
    assert re.search(r"run\.folder: runs/demo: is in the copy of the working folder that Ray deletes", refused.stdout)


def test_the_job_server_asks_for_the_token(launched: Launched) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{launched.dashboard}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    token = Path(launched.environment["HOME"], ".ray", "auth_token")
    assert token.stat().st_mode & 0o077 == 0
    asked = urllib.request.Request(
        f"http://127.0.0.1:{launched.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token.read_text()}"}
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        assert len(json.load(answer)) == 3


def test_every_port_of_the_cluster_is_on_loopback(launched: Launched) -> None:
    sockets = set()
    for pid in family(launched.process.pid):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                address, port = local.split(":")
                found.add((address, int(port, 16)))
    assert launched.dashboard in {port for _, port in found}
    assert len(found) > 5
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert {address for address, _ in found} <= loopback
