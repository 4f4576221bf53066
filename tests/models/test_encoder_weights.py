"""Image encoders from every published format, and the refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from named_weights import load_named_weights
from weight_states import State, prefixed, same

from slidr.models.download import resolve
from slidr.models.files import WeightsError, read_checkpoint
from slidr.models.resnet import resnet18
from slidr.models.teachers import TEACHERS, build_teacher
from slidr.models.weights import encoder_state, load_encoder


@pytest.fixture(scope="module")
def resnet_state() -> State:
    return load_named_weights(resnet18()).state_dict()


FC = {"fc.weight": torch.ones(3, 512), "fc.bias": torch.ones(3)}


def published(kind: str, state: State) -> dict[str, Any]:
    """The checkpoint that authors of `kind` publish for an encoder with `state`."""
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    if kind == "torchvision":
        return {**state, **FC}
    if kind == "moco":
        mlp = {"fc.0.weight": torch.ones(4, 4), "fc.2.weight": torch.ones(4, 4)}
        queue = {"module.queue": torch.ones(2, 2), "module.queue_ptr": torch.ones(1)}
        query, key = (
            prefixed({**state, **mlp}, "module.encoder_q."),
            prefixed({**other, **mlp}, "module.encoder_k."),
        )
        return {"epoch": 800, "arch": "resnet50", "state_dict": {**key, **query, **queue}}
    if kind == "pixpro":
        keys = {**prefixed(other, "module.encoder_k."), **prefixed(state, "module.encoder.")}
        return {"opt": {"lr": 1.0}, "model": {**keys, "module.projector.linear1.weight": torch.ones(2, 2)}}
    if kind == "swav":
        heads = {"projection_head.0.weight": torch.ones(2, 2), "prototypes.weight": torch.ones(2, 2)}
        return prefixed({**state, **heads}, "module.")
    if kind == "obow":
        return {"network": {**state, **FC}}
    if kind == "dino":
        return dict(state)
    if kind == "dino_training":
        heads = {"module.head.mlp.0.weight": torch.ones(2, 2)}
        return {
            "student": {**prefixed(other, "module.backbone.")},
            "teacher": {**prefixed(state, "module.backbone."), **heads},
        }
    if kind == "slidr":
        return {
            "model_points": {"final.kernel": torch.ones(2, 2)},
            "model_images": {**prefixed(state, "encoder."), "decoder.0.weight": torch.ones(2, 2)},
        }
    raise AssertionError(kind)


FORMATS = ["torchvision", "moco", "pixpro", "swav", "obow", "dino", "dino_training", "slidr"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_published_encoder_format_loads_whole(kind: str, resnet_state: State, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.pth"
    torch.save(published(kind, resnet_state), path)
    encoder = resnet18()
    report = load_encoder(encoder, read_checkpoint(path), "resnet18", str(path))
    assert same(encoder, resnet_state)
    assert set(report.loaded) == set(resnet_state)
    assert report.missing == ()
    assert all(name.startswith(("fc.", "projection_head.", "prototypes.")) for name in report.skipped)


@pytest.mark.parametrize("name", ["dino_vits16", "efficientnet_lite0"])
def test_other_encoders_load_strictly_from_a_path(name: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = build_teacher(name)
    state = teacher.encoder.state_dict()
    torch.save({**state, **({"head.weight": torch.ones(1)} if name == "dino_vits16" else {})}, tmp_path / "w.pth")
    loaded = build_teacher(name, weights=str(tmp_path / "w.pth"))
    assert same(loaded.encoder, state)


def test_packaged_imagenet_weights_load_and_only_the_unused_blocks_are_skipped() -> None:
    encoder = TEACHERS["efficientnet_lite0"].encoder()
    state = read_checkpoint(resolve("imagenet", encoder="efficientnet_lite0"))
    report = load_encoder(encoder, state, "efficientnet_lite0")
    assert same(encoder, state)
    assert set(report.loaded) | set(report.skipped) == set(state)
    assert report.missing == ()
    blocks = {int(name.split(".")[1]) for name in report.skipped if name.startswith("_blocks.")}
    assert blocks == {11, 12, 13, 14, 15}


def test_counters_of_batches_may_be_missing_but_statistics_may_not(resnet_state: State) -> None:
    old = {name: value for name, value in resnet_state.items() if not name.endswith("num_batches_tracked")}
    encoder = resnet18()
    report = load_encoder(encoder, old, "resnet18")
    assert set(report.loaded) == set(old)
    assert report.missing == ()
    del old["layer3.1.bn2.running_var"]
    with pytest.raises(WeightsError, match=r"x.pth: lacks what the model needs: 1 \(layer3.1.bn2.running_var\)"):
        load_encoder(encoder, old, "resnet18", "x.pth")


def test_a_deeper_network_is_refused(resnet_state: State) -> None:
    deeper = {**resnet_state, "layer3.2.conv1.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"no place for: 1 \(layer3.2.conv1.weight\)"):
        load_encoder(resnet18(), deeper, "resnet18")


def test_a_wrong_shape_is_refused_with_both_shapes_and_changes_nothing(resnet_state: State) -> None:
    wrong = {**resnet_state, "conv1.weight": torch.ones(64, 1, 7, 7)}
    encoder = resnet18()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=r"conv1.weight has shape \(64, 1, 7, 7\), the model's has \(64, 3, 7, 7\)"):
        load_encoder(encoder, wrong, "resnet18")
    assert same(encoder, before)


def test_a_checkpoint_without_the_encoder_is_an_error_that_shows_what_is_in_it() -> None:
    with pytest.raises(WeightsError, match=r"v.pth: no vits16 in it: .* cls_token, .*; got 1 \(conv1.weight\)"):
        encoder_state({"conv1.weight": torch.ones(1)}, "vits16", "v.pth")
    with pytest.raises(WeightsError, match=r"e.pth: no state dict in it; .* found 1 \(epoch\)"):
        encoder_state({"epoch": 3}, "resnet50", "e.pth")
