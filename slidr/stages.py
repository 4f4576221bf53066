"""What each command does: one function a stage, from files to files. The CLI and the jobs call these."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from slidr.cluster.evaluate import evaluate, evaluation_config
from slidr.cluster.finetune import finetune
from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import SuperpixelReport, compute_superpixels
from slidr.cluster.tune import search
from slidr.config import Config, ConfigError, WorldConfig
from slidr.data import nuscenes, semantic_kitti, storage
from slidr.data.download import Download
from slidr.data.frames import open_table, write_frames
from slidr.data.synthetic import write_dataroot
from slidr.models.download import student_file
from slidr.models.export import Spconv, export_safetensors, export_slidr, metadata_of, openpcdet_state
from slidr.models.files import read_checkpoint, write_checkpoint
from slidr.models.weights import student_state
from slidr.preflight.doctor import preflight
from slidr.training.runs import RunFolder, folder_of
from slidr.training.segment import build_segmenter
from slidr.urls import RedactedError, redact_url

ExportFormat = Literal["openpcdet", "slidr", "safetensors"]


class _PublicConsole(Console):
    """The terminal; what is printed shows no secret of a URL."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(redact_url(each) if isinstance(each, str) else each for each in objects), **options)


console = _PublicConsole(stderr=True, highlight=False, soft_wrap=True)


class StageError(RedactedError, RuntimeError):
    """A stage that did all it could, but not everything; the message says what is missing."""


def make_frames(config: Config) -> str:
    """Reads the data set's tables once and writes the frame table; returns its path."""
    preflight(config, "frames", console)
    data = config.data
    download = _read(config)
    frames = download.frames
    taken = data.allow_missing if download.left_out else None  # of a whole download nothing is left out
    write_frames(frames, data.frames, data.dataset, taken, download.left_out)
    for note in download.notes:
        console.print(f"frames: {note}", style="yellow", markup=False)
    scenes = len({frame.scene for frame in frames})
    console.print(f"frames: {len(frames)} keyframes of {scenes} scenes -> {data.frames}")
    if download.left_out:
        console.print(
            f"frames: the download is not whole; by data.allow_missing: {taken} the table is {download.left_out}"
        )
    return data.frames


def make_superpixels(config: Config) -> SuperpixelReport:
    """One label map for every image of the training and validation splits that has none yet.

    Raises `StageError` listing the images that could not be read, after everything else is done.
    """
    preflight(config, "superpixels", console)
    table = open_table(config.data.frames, config.data.dataset)
    frames = table.select((config.data.train_split, config.data.val_split))
    report = compute_superpixels(frames, config.data, config.superpixels, config.cluster)
    console.print(f"superpixels: {report.computed} computed, {report.skipped} there already -> {report.folder}")
    if report.failed:
        lines = "\n".join(f"  {reason if path in reason else f'{path}: {reason}'}" for path, reason in report.failed)
        raise StageError(
            f"{len(report.failed)} images could not be read; mend or replace them and run the "
            f"same command again, which does only what is missing:\n{lines}"
        )
    return report


def run_pretraining(config: Config) -> dict[str, Any]:
    """Distils a student and shows its scores; see `slidr.cluster.train`."""
    if "cross_entropy_lovasz" in config.loss.names:
        raise ConfigError("loss.names: cross_entropy_lovasz needs labels; it is for slidr finetune")
    preflight(config, "pretrain", console)
    folder = folder_of(config)
    _tell_if_finished(config, folder)
    result = pretrain(config)
    table = Table(
        title=f"{redact_url(folder.path)}: {result['steps']} steps, {result['epochs']} epochs", title_justify="left"
    )
    table.add_column("held-out frames")
    table.add_column("trained", justify="right")
    table.add_column("untrained", justify="right")
    table.add_row("superpixel retrieval", f"{result['retrieval']:.1%}", f"{result['retrieval_untrained']:.1%}")
    table.add_row("validation loss", f"{result['val_loss']:.3f}", "")
    console.print(table)
    console.print(f"student -> {result['student']}")
    if "picture" in result:
        console.print(f"picture -> {result['picture']}")
    return result


def run_finetuning(config: Config) -> dict[str, Any]:
    """Fine-tunes (or probes) a student and shows its scores; see `slidr.cluster.finetune`."""
    preflight(config, "finetune", console)
    report = build_segmenter(config)[1]  # fails before any worker is started
    loaded = f"{redact_url(config.student.weights or '')}: {report}" if report else "random"
    console.print(f"weights: {loaded}")
    folder = folder_of(config)
    _tell_if_finished(config, folder)
    result = finetune(config)
    title = f"{redact_url(folder.path)}: {result['steps']} steps, {result['epochs']} epochs"
    table = Table("validation", title=title, title_justify="left")
    table.add_column("last", justify="right")
    table.add_column("best", justify="right")
    best = f"{result['best_val_miou']:.1%} (epoch {result['best_epoch']})" if "best_val_miou" in result else ""
    table.add_row("mIoU", f"{result['val_miou']:.1%}", best)
    table.add_row("accuracy", f"{result['val_accuracy']:.1%}", "")
    console.print(table)
    console.print(f"student -> {result['student']}; scores: slidr evaluate CONFIG --checkpoint {result['student']}")
    return result


def run_evaluation(config: Config) -> dict[str, Any]:
    """Scores a checkpoint and shows the page; see `slidr.cluster.evaluate`."""
    preflight(evaluation_config(config), "evaluate", console)
    result = evaluate(config)
    if "evaluation" in result:
        page = next(path for path in result["files"] if storage.name_of(path).endswith(".md"))
        console.print(storage.read_bytes(page, storage.RECORD_BYTES).decode(), markup=False)
        console.print(f"also in {', '.join(result['files'])}")
    if "submission" in result:
        console.print(f"submission -> {result['submission']}")
    if "submission_lacks" in result:
        console.print(
            f"submission: is not whole, the benchmark will refuse it: lacks {result['submission_lacks']}",
            style="yellow",
            markup=False,
        )
    return result


def run_search(config: Config) -> dict[str, Any]:
    """Searches learning rates for each label fraction and shows the table; see `slidr.cluster.tune`."""
    preflight(config, "tune", console)
    result = search(config, lambda line: console.print(line, markup=False))
    console.print(result["page"], markup=False)
    console.print(f"also in {', '.join(result['files'])}")
    if result["models"]:
        console.print(f"models: {', '.join(result['models'])}")
    if not result["recorded"]:
        console.print("MLflow lacks a part of this, as it could not be reached: the same command sends the rest")
    return result


def export_student(
    checkpoint: str | Path,
    form: ExportFormat,
    out: str | Path | None = None,
    intensity_scale: float | None = None,
    spconv: Spconv = 2,
) -> str:
    """Writes the student of any readable checkpoint in another tool's layout; returns the path.

    Without `out` the file stands beside the checkpoint, named by the format; that of a checkpoint from the web in the
    working folder. Both may be in an object store. `intensity_scale` and `spconv` are of the format openpcdet, see
    `openpcdet_state`. Raises `WeightsError` for a file that cannot be read or holds no student.
    """
    if form != "openpcdet" and (intensity_scale is not None or spconv != 2):
        raise ConfigError(f"export: intensity_scale and spconv only apply to --format openpcdet, got {form}")
    source = redact_url(os.fspath(checkpoint))
    contents = read_checkpoint(student_file(checkpoint))
    state = student_state(contents, source)
    path = os.fspath(out) if out is not None else _export_path(os.fspath(checkpoint), _EXPORT_ENDINGS[form])
    if Path(path).exists() and os.path.realpath(path) == os.path.realpath(checkpoint):
        raise ConfigError(f"export: {path}: is the checkpoint itself; pass another file as --out")
    epoch, config = metadata_of(contents, source)
    tensors = len(state)
    with tempfile.TemporaryDirectory() as scratch:
        # The formats' writers write files of this machine.
        target = Path(scratch, "student") if storage.is_remote(path) else Path(path)
        if form == "openpcdet":
            exported = openpcdet_state(state, intensity_scale, spconv)
            tensors = len(exported["model_state"])  # without the pretraining head
            write_checkpoint(target, exported)
        elif form == "slidr":
            write_checkpoint(target, export_slidr(state, None, epoch, config))
        else:
            export_safetensors(target, state, epoch, config)
        if storage.is_remote(path):
            storage.write_bytes_atomic(path, target.read_bytes())
    console.print(f"export: {tensors} tensors -> {redact_url(path)}")
    return path


def make_world(out: str | Path, world: WorldConfig, workers: int = 1) -> Path:
    """Writes (or completes) a synthetic nuScenes dataroot; returns its path."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("synthetic world", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        root = write_dataroot(
            out,
            splits={"parametrize": world.parametrize, "verify": world.verify, "val": world.val},
            keyframes=world.keyframes,
            scale=world.scale,
            seed=world.seed,
            workers=workers,
            progress=show,
        )
    console.print(f"synthetic world: {root}")
    return root


def _tell_if_finished(config: Config, folder: RunFolder) -> None:
    if config.run.resume and folder.result() is not None:
        console.print(f"{folder.path}: finished already; its scores again")


_EXPORT_ENDINGS: dict[ExportFormat, str] = {
    "openpcdet": "-openpcdet.pth",
    "slidr": "-slidr.pt",
    "safetensors": ".safetensors",
}


def _export_path(source: str, ending: str) -> str:
    """A name beside the checkpoint's, or in the working folder for one from the web, where none can be written."""
    if source.startswith(("http://", "https://")):
        source = storage.name_of(source)
    base, mark, query = source.partition("?") if storage.is_remote(source) else (source, "", "")
    return os.path.splitext(base)[0] + ending + mark + query


def _read(config: Config) -> Download:
    data = config.data
    if data.dataset == "semantic_kitti":
        return semantic_kitti.read_download(data.root)
    with console.status("reading tables") as status:
        return nuscenes.read_download(data.root, data.version, report=status.update, allow_missing=data.allow_missing)
