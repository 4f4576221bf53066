"""The layering of the house, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "slidr"

# Rooms from the ground up; a room may import its own level's and lower ones. See docs/architecture.md.
LEVELS: list[set[str]] = [
    {"urls"},
    {"types", "shapes", "config"},
    {"ops", "sparse", "losses", "metrics"},
    {"data"},
    {"models"},
    {"training"},
    {"tuning"},
    {"report", "planning"},
    {
        "tracking_errors",
        "tracking_file",
        "tracking_store",
        "tracking_journal",
        "tracking",
        "tracking_search",
        "tracking_models",
        "tracking_page",
    },
    {"cluster"},
    {"preflight"},
    {"stages", "label_efficiency"},
    {"demo"},
    {"cli", "interrupts"},
]

# The only places that may import a foreign library.
DOORS: dict[str, set[str]] = {
    "ray": {"cluster"},
    "mlflow": {"tracking", "tracking_file", "tracking_store", "tracking_journal", "tracking_models"},
    "optuna": {"tuning/proposals"},
    "nuscenes": {"data/nuscenes"},
    "skimage": {"ops/superpixels"},
    "numba": {"ops/slic_kernels", "ops/superpixels"},
    "PIL": {"data/images", "data/nuscenes", "data/synthetic/dataroot"},  # nuscenes: to restore its limit of pixels
    "MinkowskiEngine": {"sparse/minkowski"},
    "matplotlib": {"report"},
    "yaml": {"config/yaml_text"},
    "triton": {"sparse/triton_kernels"},
    "llvmlite": {"sparse/cpu_kernels"},
    "jaxtyping": {"shapes"},
}

# Rooms that must run where there is only torch and numpy.
CORE = ("types", "ops", "sparse", "models", "losses", "metrics", "training", "tuning")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).with_suffix("").as_posix(), path


def imports(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(room: str) -> int:
    for number, rooms in enumerate(LEVELS):
        if room in rooms:
            return number
    raise AssertionError(f"{room} has no place in the house; add it to LEVELS and to docs/architecture.md")


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_point_downwards_and_foreign_libraries_have_one_door(name: str, path: Path) -> None:
    room = name.split("/")[0]
    if room == "__init__":
        return
    for imported in imports(path):
        top, *rest = imported.split(".")
        if top == "slidr" and rest and rest[0] != "__version__":
            assert level(rest[0]) <= level(room), f"{name} imports {imported}, which is above it"
        for library, doors in DOORS.items():
            if top == library:
                assert any(name == door or name.startswith(f"{door}/") for door in doors), (
                    f"{name} imports {imported}; the door to {library} is {sorted(doors)}"
                )


def test_every_room_of_the_core_has_files_and_names_no_framework() -> None:
    for room in CORE:
        files = [path for name, path in modules() if name.split("/")[0] == room]
        assert files, room
        for path in files:
            tops = {imported.split(".")[0] for imported in imports(path)}
            assert not tops & {"ray", "mlflow", "nuscenes"}, path
