"""The config schema: what it takes, what it refuses, and that every shipped file is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slidr.cli import override
from slidr.config import Config, ConfigError, decode, dump, fingerprint, load, parse, public_dict, to_dict

# What the files of a kind need not name, as their commands do not read it.
_PRETRAINING_UNREAD = (
    "world.",
    "demo.",
    "tune.",
    "evaluation.",
    "optim.head_lr",
    "student.freeze",
    "loss.class_weights",
)
_DOWNSTREAM_UNREAD = (
    "world.",
    "demo.",
    "tune.",
    "superpixels.",
    "teacher.",
    "data.cameras",
    "data.image_size",
    "data.min_depth",
    "data.augment.drop_cuboid",
    "data.augment.crop",
    "data.augment.flip_images",
    "data.augment.shuffle_cameras",
    "loss.temperature",
    "loss.min_points",
    "loss.pairs",
    "loss.gather_negatives",
    "run.score_frames",
    "cluster.superpixel_cpus",
)
UNREAD = {
    "demo": tuple(key for key in _PRETRAINING_UNREAD if key not in ("world.", "demo.")),
    "finetune": _DOWNSTREAM_UNREAD,
    "probe": _DOWNSTREAM_UNREAD,
    "tune": tuple(key for key in _DOWNSTREAM_UNREAD if key != "tune."),
}

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_name_every_key(path: Path) -> None:
    config = load(path)

    def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in values.items():
            found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
        return found

    written = keys(yaml.safe_load(path.read_text()))
    known = keys(to_dict(config))
    kind = path.parent.name if path.parent.name in UNREAD else path.stem
    optional = {key for key in known if key.startswith(UNREAD.get(kind, _PRETRAINING_UNREAD))}
    assert written <= known
    assert known - written <= optional


def test_dump_and_parse_are_inverse() -> None:
    config = decode({"optim": {"lr": 3e-7}, "data": {"cameras": ["CAM_BACK"]}})
    assert parse(dump(config)) == config


@given(
    lr=st.floats(1e-9, 10, allow_nan=False),
    size=st.tuples(st.integers(1, 999), st.integers(1, 999)),
    name=st.text(min_size=1, max_size=20),
)
def test_any_valid_value_survives_yaml(lr: float, size: tuple[int, int], name: str) -> None:
    config = decode({"optim": {"lr": lr}, "data": {"image_size": list(size)}, "tracking": {"experiment": name}})
    assert parse(dump(config)) == config


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"optm": {}}, ["optm", "did you mean optim?"]),
        ({"optim": {"weight_decoy": 1}}, ["optim.weight_decoy", "optim.weight_decay"]),
        ({"data": {"voxel": {"sizes": 1}}}, ["data.voxel.sizes", "data.voxel.size"]),
        ({"optim": {"lr": "fast"}}, ["optim.lr", "'fast'"]),
        ({"optim": {"epochs": 2.5}}, ["optim.epochs", "2.5"]),
        ({"optim": {"epochs": True}}, ["optim.epochs", "True"]),
        ({"run": {"resume": 1}}, ["run.resume"]),
        ({"student": {"name": "minkunet34"}}, ["student.name", "minkunet34c"]),
        ({"optim": 3}, ["optim", "mapping"]),
        ({"data": {"cameras": ["CAM_TOP"]}}, ["data.cameras", "CAM_TOP", "CAM_FRONT"]),
        ({"optim": {"batch_size": 3}, "cluster": {"num_workers": 2}}, ["optim.batch_size", "multiple of 2"]),
        ({"optim": {"precision": "float16"}}, ["optim.precision", "cluster.use_gpu"]),
        ({"student": {"name": "voxelnet", "engine": "minkowski"}}, ["student.engine", "torch"]),
        ({"data": {"augment": {"crop_area": [0.5, 0.1]}}}, ["data.augment.crop_area"]),
        ({"optim": {"lr": -1.0}}, ["optim.lr", "positive"]),
        ({"optim": {"lr": "1e-3"}}, ["optim.lr", "number"]),
        ({"run": {"folder": "s3://bucket/runs"}}, ["tracking.uri", "s3://bucket/runs", "sqlite"]),
        ({"cluster": {"num_workers": [1, 3]}}, ["optim.batch_size", "each of 1 to 3 workers", "multiple of 6"]),
        ({"cluster": {"num_workers": [2, 1]}}, ["cluster.num_workers", "1 <= min <= max"]),
        ({"cluster": {"num_workers": [0, 1]}}, ["cluster.num_workers", "1 <= min <= max"]),
        ({"cluster": {"num_workers": [1, 2, 4]}}, ["cluster.num_workers"]),
        ({"cluster": {"num_workers": -1}}, ["cluster.num_workers"]),
        ({"data": {"train_fraction": 0.7}}, ["data.train_fraction", "0.7", "k = 1", "k = 2"]),
        ({"tune": {"fractions": [0.01, 0.4]}}, ["tune.fractions", "0.4", "k = 2", "k = 3"]),
        ({"student": {"freeze": True}}, ["student.freeze", "fine-tuning", "pretraining does not read it"]),
        ({"optim": {"head_lr": 2.0}}, ["optim.head_lr", "pretraining does not read it"]),
        ({"loss": {"class_weights": [1.0] * 64}}, ["loss.class_weights", "pretraining does not read it"]),
        ({"optim": {"max_steps": 0}}, ["optim.max_steps", "0", "at least 1"]),
        ({"optim": {"max_steps": -3}, "evaluation": {"checkpoint": "student.pt"}}, ["optim.max_steps", "-3"]),
    ],
)
def test_wrong_configs_are_refused_by_the_key_that_is_wrong(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(raw, "file.yaml")
    message = str(caught.value)
    assert message.startswith("file.yaml")
    for word in words:
        assert word in message


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load(path)
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_fingerprints_name_values_not_field_order() -> None:
    first = decode({"optim": {"lr": 0.1, "epochs": 3}})
    second = decode({"optim": {"epochs": 3, "lr": 0.1}})
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(decode({"optim": {"lr": 0.1, "epochs": 4}}))


def test_command_line_overrides_keep_the_files_other_values() -> None:
    base = decode({"optim": {"lr": 0.1, "epochs": 7}})
    changed = override(base, ["--optim.lr", "0.25", "--run.resume"])
    assert changed.optim.lr == 0.25
    assert changed.optim.epochs == 7
    assert changed.run.resume
    assert base == decode({"optim": {"lr": 0.1, "epochs": 7}})


def test_command_line_overrides_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"optim\.batch_size"):
        override(Config(), ["--cluster.num_workers", "3"])


def test_the_number_of_workers_is_one_number_or_a_range() -> None:
    fixed, elastic = decode({"cluster": {"num_workers": 2}}), decode({"cluster": {"num_workers": [1, 2]}})
    assert (fixed.cluster.min_workers, fixed.cluster.max_workers, fixed.cluster.elastic) == (2, 2, False)
    assert (elastic.cluster.min_workers, elastic.cluster.max_workers, elastic.cluster.elastic) == (1, 2, True)
    assert parse(dump(elastic)) == elastic
    assert override(Config(), ["--cluster.num_workers", "1", "2"]).cluster == elastic.cluster
    assert override(elastic, ["--cluster.num_workers", "2"]).cluster == fixed.cluster


def test_exponents_without_a_point_are_numbers() -> None:
    assert parse("optim: {lr: 1e-3, weight_decay: 2E-4}").optim.lr == 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.log_every", 0),
        ("run.score_frames", 0),
        ("run.name", "../elsewhere"),
        ("run.name", ""),
        ("data.max_val_frames", 0),
        ("data.cameras", []),
        ("optim.lr", float("inf")),
        ("loss.pairs", 0),
        ("superpixels.sigma", -1.0),
        ("cluster.local_cpus", 0),
    ],
)
def test_values_that_cannot_work_are_refused_by_key(key: str, value: Any) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        decode({section: {name: value}})


def test_records_of_a_config_keep_no_secrets() -> None:
    config = decode(
        {
            "tracking": {"uri": "https://user:word@host:5000/path?token=hidden"},
            "teacher": {"weights": "https://host/weights.pt?signature=hidden"},
            "data": {"root": "s3://key:word@bucket/nuscenes"},
        }
    )
    text = dump(config)
    for secret in ("user", "word", "hidden", "key:"):
        assert secret not in text
    assert public_dict(config)["tracking"]["uri"] == "https://host:5000/path"
    assert public_dict(config)["data"]["root"] == "s3://bucket/nuscenes"
