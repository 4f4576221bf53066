"""Foreign and own state dicts into our modules, strictly: a misfit is an error, and a report lists what is left out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from slidr.config import VoxelConfig
from slidr.models.download import EncoderName, resolve, student_file
from slidr.models.files import WeightsError, read_checkpoint, sha256_of
from slidr.models.numbers import first_problem
from slidr.urls import redact_url

__all__ = [
    "LoadReport",
    "WeightsError",
    "encoder_state",
    "load_encoder",
    "load_student",
    "read_checkpoint",
    "resolve",
    "student_state",
    "voxel_expectation",
    "weights_digest",
]

State = dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """Names loaded; names of the checkpoint that were skipped; names of the module that kept their values."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"loaded {len(self.loaded)}, skipped {_some(self.skipped)}, missing {_some(self.missing)}"


# ---------------------------------------------------------------------------------------------- teachers

# A published file holds its state dict under one of these names, or is one itself.
_ENCODER_CONTAINERS = ("model_images", "state_dict", "teacher", "network", "model")

# What stands before the encoder's own names: MoCo; PixPro; DINO's training files; SwAV, DeepCluster; SLidR; each with
# and without the `module.` of a training on several GPUs. The first that leads to the anchor is taken. The momentum
# copy (encoder_k) has another prefix.
_ENCODER_PREFIXES = tuple(
    wrapper + prefix
    for prefix in ("encoder_q.", "model_images.encoder.", "encoder.", "backbone.", "")
    for wrapper in ("module.", "")
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

# What a teacher has no use for: classifiers, projections and prototypes, and Lite0's blocks beyond stride 16.
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

    Read are a plain state dict, and ones under `state_dict` (MoCo), `model` (PixPro), `network` (OBoW),
    `teacher` (DINO's training files) or `model_images` (SLidR). What does not carry the encoder's prefix is
    left out. Raises `WeightsError` where no such encoder is found.
    """
    state = _tensors(checkpoint, _ENCODER_CONTAINERS, source)
    anchor = _ANCHORS[kind]
    for prefix in _ENCODER_PREFIXES:
        if prefix + anchor in state:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    prefixes = ", ".join(prefix for prefix in _ENCODER_PREFIXES if prefix)
    raise WeightsError(
        f"{source}: no {kind} in it: expected {anchor}, alone or after one of {prefixes}; got {_some(tuple(state))}"
    )


def require_encoder(path: str | Path, kind: EncoderName) -> None:
    """Raises `WeightsError` for a file that cannot be read or holds no such encoder, or not one of finite numbers."""
    state = encoder_state(read_checkpoint(path), kind, str(path))
    _require_numbers({n: v for n, v in state.items() if not n.startswith(_UNUSED_BY_ENCODER)}, None, str(path))


def load_encoder(
    encoder: nn.Module, checkpoint: Mapping[str, Any], kind: EncoderName, source: str = "checkpoint"
) -> LoadReport:
    """Fills `encoder` from a checkpoint of any published format.

    Every parameter and statistic has to be there with its shape, and only heads may be left over; else
    `WeightsError`.
    """
    state = encoder_state(checkpoint, kind, source)
    own = encoder.state_dict()
    skipped = {name for name in state if name not in own and name.startswith(_UNUSED_BY_ENCODER)}
    wanted = {name: value for name, value in state.items() if name not in skipped}
    return _load(encoder, wanted, skipped, source)


# ---------------------------------------------------------------------------------------------- students

_STUDENT_CONTAINERS = ("student", "model_points", "state_dict", "model")
_STUDENT_PREFIXES = ("model_points.", "model.", "module.", "encoder.")
_POINT_BRANCH = "model_points."  # Lightning keeps the image branch beside it
_CONTRAST_TRUNK = "trunk.2."  # where DepthContrast keeps the voxel network, among its other branches
_CONTRAST_HEAD = "head."  # its projection, of no use to a student
_HEAD = "final."

# The first layer's name, in every VoxelNet and in every MinkUNet.
VOXELNET_STEM = "conv_input.0.weight"
MINKUNET_STEM = "conv0p1s1.kernel"
STUDENT_STEMS = (VOXELNET_STEM, MINKUNET_STEM)


def load_student(
    module: nn.Module,
    path: str | Path,
    *,
    expect: Mapping[str, Any] | None = None,
    head: Literal["strict", "skip"] = "strict",
) -> LoadReport:
    """Fills a student from a checkpoint file of any known format: on this machine, in an object store or at a URL.

    Known are our own {"student": ...} and .safetensors, SLidR's pretraining and downstream files
    (`model_points`), Lightning's and PointContrast's `state_dict`, and DepthContrast's `model`. `expect`
    holds the run's `voxel_size`, `cylindrical_coordinates` and `azimuth_wrap` (see `voxel_expectation`), compared with
    those of the checkpoint's config where it has them. `head="skip"` leaves the layer `final` as it is, for
    fine-tuning on other classes; it is then among the skipped. Raises `WeightsError` naming file and values
    where anything does not fit; the module is then unchanged.
    """
    source = redact_url(str(path))
    checkpoint = read_checkpoint(student_file(path))
    if expect is not None:
        _agree(checkpoint.get("config", checkpoint.get("hyper_parameters")), expect, source)
    own = module.state_dict()
    found = _tensors(checkpoint, _STUDENT_CONTAINERS, source)
    branch = _branch(found)
    state: State = {}
    skipped: set[str] = set()
    for full, value in branch.items():
        name = _stripped(full, own)
        if name in state:
            raise WeightsError(f"{source}: two entries for {name}; keep only the student's state dict in it")
        if head == "skip" and name.startswith(_HEAD):
            skipped.add(name)
        elif _CONTRAST_TRUNK in full and name.startswith(_CONTRAST_HEAD):
            skipped.add(full)
        else:
            state[name] = _fitted(value, own.get(name))
    skipped |= found.keys() - branch.keys()
    if head == "strict":
        _same_classes(state, own, source)
    return _load(module, state, skipped, source, head_is_optional=head == "skip")


def student_state(checkpoint: Mapping[str, Any], source: str = "checkpoint") -> State:
    """The student inside a checkpoint's contents, under the published names, whatever container and prefix it has.

    Kernels of spconv 1 are turned into spconv 2's layout.
    For where there is no module to fill: the names are those of the student that `load_student` would take. Raises
    `WeightsError` where neither a VoxelNet nor a MinkUNet is in it, or more than one.
    """
    branch = _branch(_tensors(checkpoint, _STUDENT_CONTAINERS, source))
    prefixes = sorted({name.removesuffix(stem) for name in branch for stem in STUDENT_STEMS if name.endswith(stem)})
    if not prefixes:
        raise WeightsError(
            f"{source}: no student in it: expected a name ending in {' or '.join(STUDENT_STEMS)}, got "
            f"{_some(tuple(branch))}"
        )
    if len(prefixes) > 1:
        raise WeightsError(
            f"{source}: holds {len(prefixes)} students, under the prefixes {', '.join(map(repr, prefixes))}; keep only "
            f"the one that is wanted in it"
        )
    (prefix,) = prefixes
    state = {name.removeprefix(prefix): value for name, value in branch.items() if name.startswith(prefix)}
    if _CONTRAST_TRUNK in prefix:
        state = {name: value for name, value in state.items() if not name.startswith(_CONTRAST_HEAD)}
    _require_numbers(state, None, source)
    stem = state.get(VOXELNET_STEM)
    if stem is not None and stem.shape[:3] == (3, 3, 3) != stem.shape[1:4]:  # spconv 1, see `_fitted`
        return {n: v.permute(4, 0, 1, 2, 3).contiguous() if v.ndim == 5 else v for n, v in state.items()}
    return state


def weights_digest(path: str | Path) -> str:
    """The SHA-256 of a student's file, wherever it is. Raises `WeightsError` where it cannot be read."""
    return sha256_of(student_file(path))


def voxel_expectation(voxel: VoxelConfig) -> dict[str, Any]:
    """What a run with these voxels asks of a checkpoint: the argument `expect` of `load_student`."""
    return {
        "voxel_size": tuple(voxel.size),
        "cylindrical_coordinates": voxel.cylindrical,
        "azimuth_wrap": voxel.azimuth_wrap,
    }


def _branch(found: State) -> State:
    """The entries of the student's branch, where a file has several branches."""
    if any(name.startswith(_POINT_BRANCH) for name in found):
        return {name: value for name, value in found.items() if name.startswith(_POINT_BRANCH)}
    if any(_CONTRAST_TRUNK in name for name in found):
        return {name: value for name, value in found.items() if _CONTRAST_TRUNK in name}
    return found


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
    """A kernel in today's layout, where an older version of its library stored it in another."""
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
        if name in state and name in own and state[name].ndim == own[name].ndim:
            got, want = state[name].shape[axis], own[name].shape[axis]
            if got != want:
                raise WeightsError(
                    f"{source}: its last layer has {got} outputs (classes), the model's has {want}; to "
                    f'replace the head, as slidr finetune does (and slidr evaluate then scores), load with head="skip"'
                )


# ---------------------------------------------------------------------------------------------- voxels


def _agree(config: Any, expect: Mapping[str, Any], source: str) -> None:
    """Raises where the checkpoint was made with other voxels than `expect` says."""
    found = voxels_in(config, source)
    for key in ("cylindrical_coordinates", "azimuth_wrap", "voxel_size"):
        got, want = found.get(key), expect.get(key)
        if got is None or want is None:
            continue
        if key == "voxel_size":
            # Where only one of the two says so, they may still agree on being cylindrical.
            cylindrical = found.get("cylindrical_coordinates", expect.get("cylindrical_coordinates", True))
            same = _sizes(got, bool(cylindrical), source) == _sizes(want, bool(cylindrical), source)
        else:
            same = bool(got) == bool(want)
        if not same:
            raise WeightsError(
                f"{source}: was trained with {key} {got}, this run has {want}; set data.voxel to the "
                f"checkpoint's voxels, or take another checkpoint"
            )


def voxels_in(config: Any, source: str) -> dict[str, Any]:
    """`voxel_size`, `cylindrical_coordinates` and `azimuth_wrap`: at the config's top, or in ours under data.voxel.

    Raises `WeightsError` for values of another type.
    """
    config = _mapping(config, "config", source)
    data = config.get("data")
    voxel = _mapping(data.get("voxel"), "config: data.voxel", source) if isinstance(data, Mapping) else {}
    if voxel:
        found = {
            "voxel_size": voxel.get("size"),
            "cylindrical_coordinates": voxel.get("cylindrical"),
            "azimuth_wrap": voxel.get("azimuth_wrap"),
        }
    else:
        found = {key: config[key] for key in ("voxel_size", "cylindrical_coordinates") if key in config}
    for key in ("cylindrical_coordinates", "azimuth_wrap"):
        if not isinstance(found.get(key), int | None):  # a bool is an int
            raise WeightsError(f"{source}: config: {key}: expected true or false, got {type(found[key]).__name__}")
    if found.get("voxel_size") is not None:
        _sizes(found["voxel_size"], True, source)
    return found


def _mapping(value: Any, what: str, source: str) -> Mapping[str, Any]:
    value = vars(value) if isinstance(value, Namespace) else {} if value is None else value
    if not isinstance(value, Mapping):
        raise WeightsError(f"{source}: {what}: expected keys with values, got {type(value).__name__}")
    return value


_LONGEST_VOXEL = 1e6  # m or degrees; a longer one is damage


def _sizes(size: Any, cylindrical: bool, source: str) -> tuple[float, ...]:
    """One number s stands for (s m, 1 degree, s m), Cartesian (s, s, s) m."""
    if isinstance(size, int | float):
        size = (size, 1.0, size) if cylindrical else (size, size, size)
    if (
        not isinstance(size, list | tuple)
        or len(size) != 3
        or not all(isinstance(length, int | float) and 0 < length < _LONGEST_VOXEL for length in size)
    ):
        raise WeightsError(
            f"{source}: config: voxel_size: expected one or three lengths from 0 to {_LONGEST_VOXEL:g}, got "
            f"{str(size)[:80]}"
        )
    return tuple(round(float(length), 6) for length in size)


# ---------------------------------------------------------------------------------------------- both


def _tensors(checkpoint: Mapping[str, Any], containers: tuple[str, ...], source: str) -> State:
    """The state dict in a checkpoint: under one of `containers`, else the checkpoint itself."""
    for key in containers:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _named(inner)
    state = _named(checkpoint)
    if not state:
        raise WeightsError(
            f"{source}: no state dict in it; looked under {', '.join(containers)}, found {_some(tuple(checkpoint))}"
        )
    return state


def _named(values: Mapping[str, Any]) -> State:
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and isinstance(name, str)}


def _load(
    module: nn.Module, state: State, skipped: set[str], source: str, head_is_optional: bool = False
) -> LoadReport:
    """Copies `state` into the module once every name and shape fits."""
    own = module.state_dict()
    loaded = tuple(name for name in state if name in own)
    if not loaded:
        raise WeightsError(
            f"{source}: matches nothing: it has {_some(tuple(state))}, the model has {_some(tuple(own))}"
        )
    unexpected = tuple(name for name in state if name not in own)
    if unexpected:
        raise WeightsError(f"{source}: holds what the model has no place for: {_some(unexpected)}")
    # Old files lack the counters of batches, and nothing uses them.
    absent = tuple(name for name in own if name not in state and not name.endswith("num_batches_tracked"))
    needed = tuple(name for name in absent if not (head_is_optional and name.startswith(_HEAD)))
    if needed:
        only_head = all(name.startswith(_HEAD) for name in needed)
        hint = '; it has no last layer: load with head="skip" to train a new one' if only_head else ""
        raise WeightsError(f"{source}: lacks what the model needs: {_some(needed)}{hint}")
    for name in loaded:
        got, want = tuple(state[name].shape), tuple(own[name].shape)
        if got != want:
            raise WeightsError(f"{source}: {name} has shape {got}, the model's has {want}; not the same network")
    _require_numbers({name: state[name] for name in loaded}, own, source)
    module.load_state_dict(state, strict=False)
    return LoadReport(loaded, tuple(sorted(skipped)), absent)


def _require_numbers(state: State, own: State | None, source: str) -> None:
    """Raises `WeightsError` where a tensor is not made of finite numbers."""
    problem = first_problem(state, own)
    if problem is not None:
        raise WeightsError(
            f"{source}: {problem}; the file is damaged or its training diverged: take an intact or an earlier one"
        )


def _some(names: tuple[str, ...], most: int = 4) -> str:
    shown = ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})" if names else "0"
