"""Foreign and own state dicts into our modules, strictly: what does not fit is an error, what is left out is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from slidr.config import VoxelConfig
from slidr.models.download import EncoderName, resolve
from slidr.models.files import WeightsError, read_checkpoint

__all__ = [
    "LoadReport",
    "WeightsError",
    "encoder_state",
    "load_encoder",
    "load_student",
    "read_checkpoint",
    "resolve",
    "voxel_expectation",
]

State = dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What happened to every name: loaded into the module, skipped in the checkpoint, missing from it."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"loaded {len(self.loaded)}, skipped {_some(self.skipped)}, missing {_some(self.missing)}"


# A published file holds its state dict under one of these names, or is one itself.
_ENCODER_CONTAINERS = ("model_images", "state_dict", "teacher", "network", "model")

# What stands before the encoder's own names: MoCo, PixPro, DINO's training files, SwAV and DeepCluster, SLidR. The first
# that leads to the anchor is taken: MoCo's momentum copy (encoder_k) comes under another prefix and is left out.
_ENCODER_PREFIXES = (
    "module.encoder_q.",
    "module.encoder.",
    "module.backbone.",
    "backbone.",
    "module.",
    "model_images.encoder.",
    "encoder.",
    "",
)

# A name that every state dict of the encoder has.
_ANCHORS: dict[EncoderName, str] = {
    "resnet18": "conv1.weight",
    "resnet50": "conv1.weight",
    "vits16": "cls_token",
    "vits8": "cls_token",
    "vitb16": "cls_token",
    "vitb8": "cls_token",
    "efficientnet_lite0": "_conv_stem.weight",
}

# What a teacher has no use for: classifiers and projections, prototypes, and Lite0's blocks beyond stride 16.
_UNUSED_BY_ENCODER = (
    "fc.",
    "head.",
    "projection_head.",
    "prototypes.",
    "_fc.",
    "_conv_head.",
    "_bn1.",
    *(f"_blocks.{block}." for block in range(11, 16)),
)


def encoder_state(checkpoint: Mapping[str, Any], kind: EncoderName, source: str = "checkpoint") -> State:
    """The encoder's own state dict inside any of the published formats, its names stripped of their prefix.

    Read are a plain state dict, and ones under `state_dict` (MoCo), `model` (PixPro), `network` (OBoW), `teacher`
    (DINO's training files) or `model_images` (SLidR). What does not carry the encoder's prefix is left out. Raises
    `WeightsError` where no such encoder is found.
    """
    state = _tensors(checkpoint, _ENCODER_CONTAINERS, source)
    anchor = _ANCHORS[kind]
    for prefix in _ENCODER_PREFIXES:
        if prefix + anchor in state:
            return {
                name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
            }
    raise WeightsError(f"{source}: no {kind} in it: no name ends in {anchor}; it has {_some(tuple(state))}")


def load_encoder(
    encoder: nn.Module, checkpoint: Mapping[str, Any], kind: EncoderName, source: str = "checkpoint"
) -> LoadReport:
    """Fills `encoder` from a checkpoint of any published format.

    Every parameter and statistic has to be there with its shape, and only heads may be left over; else `WeightsError`.
    """
    state = encoder_state(checkpoint, kind, source)
    skipped = {
        name for name in state if name.startswith(_UNUSED_BY_ENCODER) and name not in encoder.state_dict()
    }
    return _load(
        encoder, {name: value for name, value in state.items() if name not in skipped}, skipped, source
    )


_STUDENT_CONTAINERS = ("student", "model_points", "state_dict", "model")
_STUDENT_PREFIXES = ("model.", "model_points.", "module.", "encoder.")
_CONTRAST_TRUNK = "trunk.2."  # where DepthContrast keeps the voxel network
_OTHER_BRANCHES = ("model_images.", "criterion.", "head.")


def load_student(
    module: nn.Module,
    path: str | Path,
    *,
    expect: Mapping[str, Any] | None = None,
    head: Literal["strict", "skip"] = "strict",
) -> LoadReport:
    """Fills a student from a checkpoint file of any known format.

    Known are our own {"student": ...} and .safetensors, SLidR's pretraining and downstream files (`model_points`),
    Lightning's and PointContrast's `state_dict`, and DepthContrast's `model`. `expect` holds the run's `voxel_size` and
    `cylindrical_coordinates` (see `voxel_expectation`), compared with those in the checkpoint's config where it has them.
    `head="skip"` leaves the layer `final` as it is, for fine-tuning on other classes; it is then among the skipped.
    Raises `WeightsError` naming file and values where anything else does not fit.
    """
    source = str(path)
    checkpoint = read_checkpoint(path)
    if expect is not None:
        _agree(checkpoint.get("config", checkpoint.get("hyper_parameters")), expect, source)
    own = module.state_dict()
    state: State = {}
    skipped: set[str] = set()
    found = _tensors(checkpoint, _STUDENT_CONTAINERS, source)
    branched = any(name.startswith("model_points.") for name in found)
    trunked = any(_CONTRAST_TRUNK in name for name in found)
    for full, value in found.items():
        name = _stripped(full, own)
        if (branched and not full.startswith("model_points.")) or (trunked and _CONTRAST_TRUNK not in full):
            skipped.add(full)
        elif name not in own and name.startswith(_OTHER_BRANCHES):
            skipped.add(full)
        elif name.startswith("final.") and head == "skip":
            skipped.add(name)
        else:
            state[name] = _fitted(value, own.get(name))
    if head == "strict":
        _same_classes(state, own, source)
    return _load(module, state, skipped, source, allowed_missing="final." if head == "skip" else None)


def voxel_expectation(voxel: VoxelConfig) -> dict[str, Any]:
    """What a run with these voxels asks of a checkpoint: the argument `expect` of `load_student`."""
    return {"voxel_size": tuple(voxel.size), "cylindrical_coordinates": voxel.cylindrical}


def _load(
    module: nn.Module, state: State, skipped: set[str], source: str, allowed_missing: str | None = None
) -> LoadReport:
    own = module.state_dict()
    matching = [name for name in state if name in own]
    if not matching:
        raise WeightsError(
            f"{source}: matches nothing: it has {_some(tuple(state))}, the model has {_some(tuple(own))}"
        )
    unexpected = tuple(name for name in state if name not in own)
    if unexpected:
        raise WeightsError(f"{source}: holds what the model has no place for: {_some(unexpected)}")
    # Counters that old files lack and nothing uses.
    absent = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    missing = tuple(
        name for name in absent if allowed_missing is None or not name.startswith(allowed_missing)
    )
    if missing:
        raise WeightsError(f"{source}: lacks what the model needs: {_some(missing)}")
    for name in matching:
        if state[name].shape != own[name].shape:
            raise WeightsError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
            )
    module.load_state_dict(state, strict=False)
    return LoadReport(tuple(matching), tuple(sorted(skipped)), tuple(absent))


def _tensors(checkpoint: Mapping[str, Any], containers: tuple[str, ...], source: str) -> State:
    """The state dict in a checkpoint: under one of `containers`, else the checkpoint itself."""
    for key in containers:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    state = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state:
        raise WeightsError(
            f"{source}: no state dict in it; looked under {', '.join(containers)}, found {_some(tuple(checkpoint))}"
        )
    return state


def _stripped(name: str, own: Mapping[str, Tensor]) -> str:
    """`name` without the prefixes that wrappers put before it."""
    if _CONTRAST_TRUNK in name:
        name = name.split(_CONTRAST_TRUNK, 1)[1]
    while name not in own:
        prefix = next((prefix for prefix in _STUDENT_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name


def _fitted(value: Tensor, own: Tensor | None) -> Tensor:
    """A kernel in today's layout, where an older version of its library stored the same numbers in another."""
    if own is None or value.shape == own.shape:
        return value
    if value.ndim == own.ndim + 1 and value.shape[0] == 1 and value.shape[1:] == own.shape:
        return value[0]  # a 1x1 kernel with its single offset spelled out
    if value.ndim == 5 and value.permute(4, 0, 1, 2, 3).shape == own.shape:
        return value.permute(4, 0, 1, 2, 3).contiguous()  # spconv 1: (kz, ky, kx, C_in, C_out)
    return value


def _same_classes(state: State, own: Mapping[str, Tensor], source: str) -> None:
    """Raises where the last layer answers with another number of channels than the model's."""
    for name, axis in (("final.kernel", -1), ("final.weight", 0)):
        if name in state and name in own and state[name].shape != own[name].shape:
            got, want = state[name].shape[axis], own[name].shape[axis]
            if got != want:
                raise WeightsError(
                    f"{source}: its last layer has {got} outputs (classes), the model's has {want}; to replace the head, "
                    f'as fine-tuning does, load with head="skip"'
                )


def _agree(config: Any, expect: Mapping[str, Any], source: str) -> None:
    """Raises where the checkpoint was made with other voxels than `expect` says."""
    if not isinstance(config, Mapping):
        return
    found = _voxels_in(config)
    wanted = dict(expect)
    cylindrical = found.get("cylindrical_coordinates", wanted.get("cylindrical_coordinates", True))
    for key in ("cylindrical_coordinates", "voxel_size"):
        if key not in found or wanted.get(key) is None:
            continue
        got, want = found[key], wanted[key]
        if key == "voxel_size":
            got, want = _sizes(got, bool(cylindrical)), _sizes(want, bool(cylindrical))
            same = len(got) == len(want) and all(abs(a - b) < 1e-6 for a, b in zip(got, want, strict=True))
        else:
            got, want = bool(got), bool(want)
            same = got == want
        if not same:
            raise WeightsError(
                f"{source}: was trained with {key} {found[key]}, this run has {wanted[key]}; use the same voxels in "
                f"data.voxel, or another checkpoint"
            )


def _voxels_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """`voxel_size` and `cylindrical_coordinates` as a config has them: at its top, or under data.voxel as ours does."""
    data = config.get("data")
    voxel = data.get("voxel") if isinstance(data, Mapping) else None
    if isinstance(voxel, Mapping):
        return {"voxel_size": voxel["size"], "cylindrical_coordinates": voxel["cylindrical"]}
    return {
        key: config[key] for key in ("voxel_size", "cylindrical_coordinates") if config.get(key) is not None
    }


def _sizes(size: Any, cylindrical: bool) -> tuple[float, ...]:
    """One number stands for (s, 1 degree, s) or (s, s, s)."""
    if isinstance(size, (int, float)):
        return (float(size), 1.0, float(size)) if cylindrical else (float(size),) * 3
    return tuple(float(length) for length in size)


def _some(names: tuple[str, ...], most: int = 4) -> str:
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})" if names else "0"
