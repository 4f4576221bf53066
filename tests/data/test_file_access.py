"""Files from outside are opened by `slidr.data.storage` alone, which refuses FIFOs and files above a limit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "slidr"
READERS = {"read_text", "read_bytes", "fromfile", "loadtxt", "memmap", "read_table", "read_parquet"}
LOADERS = {("json", "load"), ("np", "load"), ("Image", "open"), ("io", "open"), ("pq", "ParquetFile"), ("yaml", "load")}

# Where another way is right, and why.
OTHERS = {
    "data/frame_file": "gives pyarrow a file that storage opened",
    "data/splits": "reads a file of the package or of the devkit",
    "data/processes": "reads /proc",
    "planning/measure": "reads /proc",
    "models/files": "reads a file that it has just written",
    "models/download": "writes a download, and reads what it wrote",
    "stages": "reads a file that it has just written",
    "training/locks": "opens lock files",
}
JOURNALS = ("tracking",)  # the journal and the tracking store: files that this process appends to


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every call that opens or reads a file without storage."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        owner, _, name = text.rpartition(".")
        if text == "open" or (owner, name) in LOADERS or (name in READERS and owner != "storage"):
            yield node.lineno, text


def test_every_file_from_outside_is_read_through_storage() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name not in OTHERS and not name.startswith(JOURNALS):
            found |= {f"slidr/{name}.py:{line}": text for line, text in calls(path)}
    assert found == {}, "use storage.read_bytes(path, limit) or storage.open_read"
