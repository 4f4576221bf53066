"""Teachers: their numbers, their freeze, their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from named_weights import load_named_weights
from PIL import Image

from slidr.models import efficientnet
from slidr.models.teachers import IMAGENET_MEAN, IMAGENET_STD, TEACHERS, Teacher, build_teacher
from slidr.models.vit import VisionTransformer

GOLDEN = ["dilation_resnet50", "ppkt_resnet18", "ppkt_resnet50", "dino_vits16"]


@pytest.fixture(scope="module")
def crop(real_nuscenes: Path) -> torch.Tensor:
    """(1, 3, 224, 416) of CAM_FRONT, as the golden files crop it."""
    path = next((real_nuscenes / "samples" / "CAM_FRONT").glob("*.jpg"))
    pixels = np.asarray(Image.open(path))[200:424, 300:716]
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def street() -> torch.Tensor:
    """(1, 3, 64, 96): smooth colour and sharp edges, for tests that need no real image."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, 6, 9), dtype=np.float32))
    return F.interpolate(coarse, size=(64, 96), mode="nearest-exact")


@pytest.fixture(scope="module")
def lite() -> Teacher:
    torch.manual_seed(0)
    return build_teacher("efficientnet_lite0", weights="imagenet")


@pytest.mark.parametrize("name", GOLDEN)
def test_teacher_equals_the_original_implementation(name: Any, crop: torch.Tensor, golden: Path) -> None:
    expected = np.load(golden / "teachers.npz")[name]
    teacher = load_named_weights(build_teacher(name))
    with torch.no_grad():
        features = teacher(crop)
    assert features.shape == (1, 64, 224, 416)
    got = features[0, :, ::8, ::8].numpy()
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("dilation_resnet50", "teacher_dilation"),
        ("ppkt_resnet50", "teacher_ppkt"),
        ("dino_vits16", "teacher_dino_vits16"),
    ],
)
def test_state_dict_has_the_published_names_and_shapes(name: Any, entry: str, manifest: dict[str, Any]) -> None:
    state = build_teacher(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == manifest[entry]


@pytest.mark.parametrize(
    ("name", "width", "patch"),
    [("dino_vits8", 384, 8), ("dino_vitb16", 768, 16), ("dino_vitb8", 768, 8)],
)
def test_vision_transformers_have_their_published_sizes(name: Any, width: int, patch: int) -> None:
    with torch.device("meta"):
        encoder = TEACHERS[name].encoder()
    assert encoder.pos_embed.shape == (1, 1 + (224 // patch) ** 2, width)
    assert encoder.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert len(encoder.blocks) == 12
    assert encoder.blocks[0].mlp.fc1.weight.shape == (4 * width, width)
    # head size: the width divides into heads of 64 in every published ViT
    assert encoder.blocks[0].attn.heads * 64 == width


def test_position_embeddings_are_left_alone_at_the_pretraining_size() -> None:
    encoder = VisionTransformer(patch=16, width=8, heads=2, depth=1)
    assert encoder.positions(14, 14) is encoder.pos_embed
    assert encoder.positions(3, 29).shape == (1, 1 + 3 * 29, 8)


def test_features_have_length_one_everywhere(lite: Teacher, street: torch.Tensor) -> None:
    lengths = lite(street).norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)


@pytest.mark.parametrize("name", ["ppkt_resnet18", "efficientnet_lite0", "dino_vits16"])
def test_a_side_that_is_no_multiple_of_the_stride_is_extended_by_its_last_row_and_column(
    name: Any, street: torch.Tensor
) -> None:
    torch.manual_seed(0)
    teacher = build_teacher(name)
    stride = teacher.encoder.stride
    image = street[..., : 64 - 13, : 96 - 27]
    height, width = image.shape[-2:]
    rows = torch.arange(-(-height // stride) * stride).clamp(max=height - 1)
    columns = torch.arange(-(-width // stride) * stride).clamp(max=width - 1)
    with torch.no_grad():
        answer = teacher(image)
        whole = teacher(image[..., rows, :][..., columns])
    assert answer.shape == (1, 64, height, width)
    assert torch.allclose(answer, whole[..., :height, :width], atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50), batch=st.integers(1, 2))
def test_output_has_the_size_of_the_image(lite: Teacher, height: int, width: int, batch: int) -> None:
    with torch.no_grad():
        features = lite(torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (batch, 64, height, width)
    assert bool(torch.isfinite(features).all())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)])
def test_another_shape_is_refused_by_name(lite: Teacher, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\), got"):
        lite(torch.zeros(shape))


@pytest.mark.parametrize("name", ["dilation_resnet50", "ppkt_resnet18", "dino_vits16", "efficientnet_lite0"])
def test_only_the_head_trains(name: Any) -> None:
    teacher = build_teacher(name, out_channels=5).train()
    assert teacher.training
    assert teacher.head.training
    assert not any(module.training for module in teacher.encoder.modules())
    trainable = {key for key, value in teacher.named_parameters() if value.requires_grad}
    assert trainable == {"decoder.0.weight", "decoder.0.bias"}
    assert list(teacher.trainable_parameters()) == list(teacher.head.parameters())


def test_a_training_step_moves_the_head_and_nothing_else(street: torch.Tensor) -> None:
    torch.manual_seed(0)
    teacher = build_teacher("ppkt_resnet18").train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(teacher.trainable_parameters(), lr=1.0)
    teacher(street)[:, 0].mean().backward()
    optimizer.step()
    changed = {name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder.0.weight", "decoder.0.bias"}


def test_a_zero_feature_stays_finite_and_so_does_its_gradient(street: torch.Tensor) -> None:
    teacher = build_teacher("ppkt_resnet18")
    for parameter in teacher.trainable_parameters():
        torch.nn.init.zeros_(parameter)
    features = teacher(street)
    features.sum().backward()
    assert torch.equal(features, torch.zeros_like(features))
    assert all(bool(torch.isfinite(p.grad).all()) for p in teacher.trainable_parameters())


def test_random_weights_follow_torchs_seed() -> None:
    torch.manual_seed(3)
    one = build_teacher("efficientnet_lite0").state_dict()
    torch.manual_seed(3)
    two = build_teacher("efficientnet_lite0").state_dict()
    three = build_teacher("efficientnet_lite0").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["encoder._conv_stem.weight"], three["encoder._conv_stem.weight"])


@pytest.mark.parametrize("name", ["efficientnet_lite0", "ppkt_resnet18", "dilation_resnet50"])
def test_a_random_teacher_still_tells_places_apart(name: Any, street: torch.Tensor) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        features = build_teacher(name)(street)[0]
    assert float(features.std(dim=(1, 2)).norm()) > 0.1


def test_unknown_teacher_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown 'resnet50'; known: dilation_resnet50"):
        build_teacher("resnet50")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ EfficientNet-Lite0


def test_lite0_blocks_4_and_10_are_the_last_of_strides_8_and_16() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    x = network._conv_stem(torch.zeros(1, 3, 64, 64))
    strides = []
    for block in network._blocks:
        x = block(x)
        strides.append(64 // x.shape[-1])
    assert max(i for i, stride in enumerate(strides) if stride == 8) == efficientnet.FINE_BLOCK
    assert max(i for i, stride in enumerate(strides) if stride == 16) == efficientnet.COARSE_BLOCK


def test_lite0_encoder_equals_the_packages_network_up_to_block_10(lite: Teacher, street: torch.Tensor) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(efficientnet.packaged_weights())
    ).eval()
    outputs: list[torch.Tensor] = []
    for block in network._blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        network(street)
        features = lite.encoder(street)
    assert torch.allclose(features[:, :40], outputs[4], atol=1e-5)
    upsampled = F.interpolate(outputs[10], size=features.shape[-2:], mode="bilinear", align_corners=True)
    assert torch.allclose(features[:, 40:], upsampled, atol=1e-5)


def test_lite0_norms_meet_their_stored_statistics_nearer_with_its_own_input_scale_than_with_imagenets(
    lite: Teacher, crop: torch.Tensor
) -> None:
    def surprise(mean: tuple[float, ...], std: tuple[float, ...]) -> float:
        """Mean divergence of what the first norms see from the normal distribution they have stored."""
        divergences: list[float] = []

        def compare(norm: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
            got_mean, got_var = inputs[0].mean(dim=(0, 2, 3)), inputs[0].var(dim=(0, 2, 3)) + norm.eps
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None
            assert var is not None
            var = var + norm.eps
            per_channel = got_var / var + (got_mean - mean).square() / var - 1 - (got_var / var).log()
            divergences.append(float(per_channel.mean() / 2))

        norms = [m for m in lite.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        hooks = [norm.register_forward_pre_hook(compare) for norm in norms]
        with torch.no_grad():
            lite.encoder((crop - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        for hook in hooks:
            hook.remove()
        return float(np.mean(divergences))

    assert lite.mean.flatten().tolist() == pytest.approx(efficientnet.MEAN)
    assert lite.std.flatten().tolist() == pytest.approx(efficientnet.STD)
    assert surprise(efficientnet.MEAN, efficientnet.STD) < 0.8 * surprise(IMAGENET_MEAN, IMAGENET_STD)
