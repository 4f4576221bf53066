"""Names that users' disks hold already: a new key, or a new release, must change none of them.

`golden/schema1` holds the configs as they were with the first schema, and the fingerprints that they had.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest

from slidr.cluster.superpixels import folder_of
from slidr.config import SlicEngine, SuperpixelConfig, fingerprint, load
from slidr.config.schema import added
from slidr.training.runs import identity

GOLDEN = Path(__file__).parent / "golden" / "schema1"
RECORDED: dict[str, dict[str, str]] = json.loads((GOLDEN / "fingerprints.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_configs_of_the_first_schema_keep_their_fingerprints(name: str) -> None:
    config = load(GOLDEN / name)
    assert RECORDED[name] == {
        "identity": identity(config),
        "superpixels": fingerprint(config.superpixels.parameters),
        "evaluation": fingerprint(config.evaluation),
        "world": fingerprint(config.world),
    }


def test_the_published_superpixels_keep_their_folder() -> None:
    for engine in get_args(SlicEngine):
        assert folder_of(SuperpixelConfig(folder="maps", engine=engine)) == "maps/slic-150-6-3-def05670b2"


@dataclass(frozen=True)
class _Before:
    sigma: float = 3.0


@dataclass(frozen=True)
class _After:
    sigma: float = 3.0
    start: str = added("grid")


@dataclass(frozen=True)
class _Outer:
    inner: _Before | _After = field(default_factory=_Before)


def test_an_added_key_counts_only_where_it_departs_from_its_default() -> None:
    assert fingerprint(_After()) == fingerprint(_Before())
    assert fingerprint(_Outer(_After())) == fingerprint(_Outer(_Before()))
    assert fingerprint(_After(start="random")) != fingerprint(_Before())
    assert fingerprint(_Outer(_After(start="random"))) != fingerprint(_Outer(_Before()))
    assert fingerprint(_After(sigma=2.0)) == fingerprint(_Before(sigma=2.0)) != fingerprint(_Before())
