"""A disk that fills up."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path


class SmallDisk:
    """A disk of its own, of so many MiB, that can be filled up; for processes of this user it lies at `path`.

    It is a tmpfs in the mount namespace of a sleeping process, so it needs no privileges where users may have
    namespaces, and is gone with that process. Raises `OSError` where they may not.
    """

    def __init__(self, mib: int) -> None:
        if shutil.which("unshare") is None:
            raise OSError("no disk can be mounted: needs util-linux's unshare")
        inside = tempfile.mkdtemp(prefix="slidr-disk-")
        mount = f'mount -t tmpfs -o size={mib}m none "$0" && echo mounted && exec sleep 3600'
        self._inside = Path(inside)
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, inside],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"mounted\n":
            reason = self._holder.communicate()[1].decode().strip()
            self._inside.rmdir()
            raise OSError(f"no disk can be mounted: {reason}")
        self.path = Path(f"/proc/{self._holder.pid}/root{inside}")

    @property
    def holder(self) -> int:
        """The process in whose mount namespace the disk lies at `inside`."""
        return self._holder.pid

    @property
    def inside(self) -> Path:
        return self._inside

    def fill(self) -> None:
        """Writes until not one byte more fits."""
        with (self.path / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                while True:
                    try:
                        file.write(bytes(size))
                    except OSError:
                        break

    def free(self) -> None:
        """Takes back what `fill` wrote."""
        (self.path / "ballast").unlink()

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()
        self._inside.rmdir()
