"""MLflow's model registry: students as plain weights and their config, without pickles.

student = load_registered("models:/tune_nuscenes-1pct@champion", "http://host:5000")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slidr.config import parse
from slidr.data import storage
from slidr.models.weights import load_student, read_checkpoint, student_state, voxel_expectation
from slidr.tracking import connect
from slidr.training.segment import Segmenter, build_segmenter

_ARTIFACT = "student"  # the folder of a run's artifacts that a version is
_WEIGHTS, _CONFIG = "student.pt", "config.yaml"


def register_student(
    uri: str, name: str, run_id: str, folder: str | Path, aliases: Sequence[str], tags: dict[str, str]
) -> int:
    """Makes the fine-tuned student of a run folder a version of a registered model; returns its number.

    A run has one version at most: asked again, its aliases are moved to it. Raises `WeightsError` for a student that is
    damaged or not made of numbers.
    """
    weights = Path(folder) / _WEIGHTS
    student_state(read_checkpoint(weights), str(weights))
    client = connect(uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
    if known:
        version = known[0].version
    else:
        for file in (_WEIGHTS, _CONFIG):
            client.log_artifact(run_id, str(Path(folder) / file), _ARTIFACT)
        source = f"{client.get_run(run_id).info.artifact_uri}/{_ARTIFACT}"
        version = client.create_model_version(name, source, run_id, tags=tags).version
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version)
    return int(version)


def load_registered(model: str, uri: str | None = None) -> Segmenter:
    """The ready, fine-tuned student called "models:/NAME@ALIAS" (or "models:/NAME/VERSION"), in eval mode, on the CPU.

    `uri` is the MLflow store's; default: the environment's MLFLOW_TRACKING_URI. Raises `ValueError` for a name of
    another form, MLflow's own error for one that the store does not know.
    """
    import mlflow

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        raise ValueError(f"{model}: no store to load it from; pass its URI or set MLFLOW_TRACKING_URI")
    version = _version(connect(uri), model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=scratch, tracking_uri=uri))
        config = parse(storage.read_bytes(folder / _CONFIG, storage.RECORD_BYTES).decode(), f"{model}: {_CONFIG}")
        segmenter, _ = build_segmenter(replace(config, student=replace(config.student, weights=None)))
        load_student(segmenter.student, folder / _WEIGHTS, expect=voxel_expectation(config.data.voxel))
    return segmenter.eval()


def _version(client: Any, model: str) -> Any:
    name, at, alias = model.removeprefix("models:/").rpartition("@")
    if at:
        return client.get_model_version_by_alias(name, alias)
    name, slash, number = model.removeprefix("models:/").rpartition("/")
    if not (slash and number.isdigit()):
        raise ValueError(f"{model!r}: names no registered model; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    return client.get_model_version(name, number)
