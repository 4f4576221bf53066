"""Sparse layers against dense conv3d, numerical gradients and the symmetries they must have."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from named_weights import load_named_weights
from torch import nn
from torch.nn import functional as F

from slidr.models.minkunet import MinkUNet14
from slidr.sparse import (
    BatchNorm,
    Convolution,
    SparseTensor,
    TransposedConvolution,
    concatenate,
    global_max,
    global_mean,
)

SHAPE = (6, 4, 8)


def grid(filled: float, channels: int, seed: int = 0, clouds: int = 2) -> tuple[torch.Tensor, SparseTensor]:
    """A dense (B, C, X, Y, Z) float64 volume, zero where empty, and the same as a sparse tensor of shuffled rows."""
    generator = torch.Generator().manual_seed(seed)
    here = torch.rand(clouds, *SHAPE, generator=generator) < filled
    dense = torch.randn(clouds, channels, *SHAPE, generator=generator, dtype=torch.float64) * here[:, None]
    index = torch.nonzero(here)
    index = index[torch.randperm(len(index), generator=generator)]
    b, x, y, z = index.unbind(1)
    return dense, SparseTensor(dense[b, :, x, y, z], index.int())


def dense_weight(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """[K, C_in, C_out] with the first axis fastest as conv3d's [C_out, C_in, x, y, z]."""
    c_in, c_out = kernel.shape[-2:]
    return kernel.reshape(size, size, size, c_in, c_out).permute(4, 3, 2, 1, 0)


def weigh(out: torch.Tensor) -> torch.Tensor:
    """A loss that rows on the unit sphere do not hold constant, as they do the sum of their squares."""
    return (out.float() * torch.linspace(-1, 1, out.shape[1], device=out.device)).sum()


def at_rows(dense: torch.Tensor, coordinates: torch.Tensor, stride: int = 1) -> torch.Tensor:
    b, x, y, z = coordinates.long().unbind(1)
    return dense[b, :, x // stride, y // stride, z // stride]


@pytest.mark.parametrize("filled", [1.0, 0.3])
@pytest.mark.parametrize("channels", [(3, 5), (12, 10)], ids=["narrow", "wide"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_submanifold_conv_matches_dense_conv3d(filled: float, channels: tuple[int, int], size: int) -> None:
    dense, x = grid(filled, channels[0])
    layer = Convolution(*channels, size, bias=True).double()
    out = layer(x)
    expected = F.conv3d(dense, dense_weight(layer.kernel, size), layer.bias[0], padding=size // 2)
    assert out.coordinates is not None
    assert torch.equal(out.coordinates, x.coordinates)
    torch.testing.assert_close(out.features, at_rows(expected, x.coordinates))


@pytest.mark.parametrize("filled", [1.0, 0.3])
@pytest.mark.parametrize("channels", [(3, 5), (12, 10)], ids=["narrow", "wide"])
def test_strided_conv_matches_dense_conv3d(filled: float, channels: tuple[int, int]) -> None:
    dense, x = grid(filled, channels[0])
    layer = Convolution(*channels, 2, stride=2).double()
    out = layer(x)
    expected = F.conv3d(dense, dense_weight(layer.kernel, 2), stride=2)
    assert out.stride == (2, 2, 2)
    torch.testing.assert_close(out.features, at_rows(expected, out.coordinates, 2))


@pytest.mark.parametrize("filled", [1.0, 0.3])
def test_transposed_conv_matches_dense_conv_transpose3d(filled: float) -> None:
    _, x = grid(filled, 10)
    down, up = Convolution(10, 12, 2, stride=2).double(), TransposedConvolution(12, 9).double()
    coarse = down(x)
    dense = torch.zeros(2, 12, *(s // 2 for s in SHAPE), dtype=torch.float64)
    b, i, j, k = (coarse.coordinates // torch.tensor([1, 2, 2, 2])).long().unbind(1)
    dense.permute(0, 2, 3, 4, 1)[b, i, j, k] = coarse.features.detach()
    out = up(coarse)
    expected = F.conv_transpose3d(dense, dense_weight(up.kernel, 2).transpose(0, 1), stride=2)
    assert torch.equal(out.coordinates, x.coordinates)
    torch.testing.assert_close(out.features, at_rows(expected, x.coordinates))


@pytest.mark.parametrize("channels", [(2, 3), (9, 8)], ids=["narrow", "wide"])
def test_gradients_agree_with_finite_differences(channels: tuple[int, int]) -> None:
    _, x = grid(0.06, channels[0], clouds=1)
    keep, down, up = Convolution(*channels, 3), Convolution(channels[1], 8, 2, stride=2), TransposedConvolution(8, 9)

    def network(features: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        y = x.replace(features)
        for layer, kernel in zip((keep, down, up), kernels, strict=True):
            y = torch.func.functional_call(layer, {"kernel": kernel}, (y,))
        return y.features

    arguments = [x.features, *(layer.kernel.double() for layer in (keep, down, up))]
    arguments = [a.detach().requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(network, arguments, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_batch_norm_equals_its_parts(relu: bool, with_residual: bool, training: bool, momentum: float | None) -> None:
    _, x = grid(0.3, 7)
    torch.manual_seed(0)
    layer, parts = (BatchNorm(7).double().train(training) for _ in range(2))
    layer.bn.momentum = parts.bn.momentum = momentum  # type: ignore[assignment]
    with torch.no_grad():
        layer.bn.weight.uniform_(0.5, 2)
        layer.bn.bias.uniform_(-1, 1)
        layer.bn.running_mean.uniform_(-1, 1)
        layer.bn.running_var.uniform_(0.5, 2)
    parts.load_state_dict(layer.state_dict())
    results = []
    for norm in (layer, parts):
        features = x.features.clone().requires_grad_()
        other = x.features.flip(0).clone().requires_grad_()
        if norm is layer:
            residual = x.replace(other) if with_residual else None
            out = norm(x.replace(features), residual=residual, relu=relu).features
        else:
            out = norm.bn(features)
            out = out + other if with_residual else out
            out = torch.relu(out) if relu else out
        (out * torch.linspace(-1, 1, 7)).sum().backward()
        results.append([out, features.grad, other.grad, norm.bn.weight.grad, norm.bn.bias.grad, *norm.bn.buffers()])
    for got, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("channels", [4, 12], ids=["narrow", "wide"])
@pytest.mark.parametrize("training", [False, True])
def test_convolution_of_a_normed_input_equals_its_parts(training: bool, channels: int) -> None:
    _, x = grid(0.3, channels)
    torch.manual_seed(0)
    fused, parts = (
        nn.ModuleList([BatchNorm(channels, momentum=0.3), Convolution(channels, 9, bias=True)]).double().train(training)
        for _ in range(2)
    )
    with torch.no_grad():
        for tensor in fused[0].state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
        fused[0].bn.bias.uniform_(-1, 1)
    parts.load_state_dict(fused.state_dict())
    results = []
    for norm, conv in (fused, parts):
        features = x.features.clone().requires_grad_()
        if norm is fused[0]:
            out = conv(x.replace(features), norm=norm).features
        else:
            out = conv(x.replace(torch.relu(norm.bn(features)))).features
        (out * torch.linspace(-1, 1, 9)).sum().backward()
        results.append([out, features.grad, *(p.grad for p in (*norm.parameters(), *conv.parameters()))])
        results[-1] += norm.bn.buffers()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_convolution_of_a_normed_input_keeps_that_input_only() -> None:
    _, x = grid(0.3, 16)
    norm, conv = BatchNorm(16).double(), Convolution(16, 24).double()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    features = x.features.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        conv(x.replace(features), norm=norm)
    large = [tensor for tensor in kept if len(tensor) == len(features)]
    assert [tensor.data_ptr() for tensor in large] == [features.data_ptr()]


@pytest.mark.parametrize("watched", ["norm", "norm.bn", "conv"])
def test_hooks_see_a_norm_before_a_convolution(watched: str) -> None:
    _, x = grid(0.3, 16)
    norm, conv = BatchNorm(16).double(), Convolution(16, 24).double()
    expected = conv(x, norm=norm.eval()).features
    calls: list[str] = []
    module = {"norm": norm, "norm.bn": norm.bn, "conv": conv}[watched]
    module.register_forward_hook(lambda *_: calls.append(watched))
    torch.testing.assert_close(conv(x, norm=norm).features, expected)
    assert calls == [watched]


def test_later_batches_leave_the_gradients_of_an_earlier_one() -> None:
    """In eval mode a norm is made of running statistics, which a training batch moves before the backward pass."""
    _, x = grid(0.3, 16)
    gradients = []
    for another_batch in (False, True):
        torch.manual_seed(0)
        norm, conv = BatchNorm(16).double().eval(), Convolution(16, 16).double()
        features = x.features.clone().requires_grad_()
        out = norm(conv(x.replace(features), norm=norm), relu=True)
        if another_batch:
            norm.train()(x.replace(5 + 3 * x.features))
        (out.features * torch.linspace(-1, 1, 16)).sum().backward()
        gradients.append([features.grad, norm.bn.weight.grad])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_training_may_follow_inference_mode() -> None:
    _, x = grid(0.4, 1)
    model = MinkUNet14(1, 8, width=0.25)
    x = SparseTensor(x.features.float(), x.coordinates)
    with torch.inference_mode():
        model.eval()(x)
    out = model.train()(x).features
    (out * torch.linspace(-1, 1, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_networks_can_be_copied_and_pickled() -> None:
    _, x = grid(0.4, 1)
    x = SparseTensor(x.features.float(), x.coordinates)
    model = MinkUNet14(1, 8, width=0.25).eval()
    for copy_of in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copy_of(x).features, model(x).features)


def test_one_voxel_takes_the_running_statistics_and_leaves_them() -> None:
    """Its variance is nothing over nothing: taken for the running one, that would stay NaN for good."""
    model = MinkUNet14(width=0.25).train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    out = model(SparseTensor(torch.ones(1, 1), torch.zeros(1, 4, dtype=torch.int32))).features
    weigh(out).backward()
    assert out.isfinite().all()
    assert model.final.kernel.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_buffers())


def test_batch_norm_can_be_converted_to_synchronised_statistics() -> None:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(MinkUNet14(width=0.25))
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm}
    _, x = grid(0.3, 1)
    with torch.no_grad():
        assert model.eval()(x.replace(x.features.float())).features.isfinite().all()


@pytest.fixture(scope="module")
def unet() -> MinkUNet14:
    torch.manual_seed(0)
    return MinkUNet14(2, 6, width=0.25).double().eval()


@torch.no_grad()
def test_permuting_points_permutes_outputs(unet: MinkUNet14) -> None:
    _, x = grid(0.4, 2)
    order = torch.randperm(len(x.features), generator=torch.Generator().manual_seed(1))
    shuffled = unet(SparseTensor(x.features[order], x.coordinates[order]))
    torch.testing.assert_close(shuffled.features, unet(x).features[order])
    assert torch.equal(shuffled.coordinates, x.coordinates[order])


@torch.no_grad()
@settings(deadline=None, max_examples=8)
@given(steps=st.tuples(*[st.integers(-100, 100)] * 3))
def test_translating_by_the_total_stride_leaves_features_unchanged(
    unet: MinkUNet14, steps: tuple[int, int, int]
) -> None:
    _, x = grid(0.4, 2)
    moved = x.coordinates + 16 * torch.tensor([[0, *steps]], dtype=torch.int32)
    torch.testing.assert_close(unet(SparseTensor(x.features, moved)).features, unet(x).features)


@torch.no_grad()
def test_clouds_of_different_size_do_not_mix(unet: MinkUNet14) -> None:
    clouds = [grid(filled, 2, seed, clouds=1)[1] for seed, filled in enumerate((0.05, 0.6, 0.3))]
    coordinates = [c.coordinates + torch.tensor([b, 0, 0, 0]) for b, c in enumerate(clouds)]
    batch = SparseTensor(torch.cat([c.features for c in clouds]), torch.cat(coordinates).int())
    alone = torch.cat([unet(c).features for c in clouds])
    torch.testing.assert_close(unet(batch).features, alone)


@pytest.mark.parametrize("training", [False, True])
def test_empty_cloud_gives_empty_output_and_zero_gradients(training: bool) -> None:
    model = MinkUNet14(width=0.25).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features = torch.zeros(0, 1, requires_grad=True)
    out = model(SparseTensor(features, torch.zeros(0, 4, dtype=torch.int32))).features
    assert out.shape == (0, 64)
    weigh(out).backward()
    assert features.grad is not None
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def lively() -> MinkUNet14:
    """Fresh weights let activations fade to nothing from block to block; these keep them near one."""
    return load_named_weights(MinkUNet14(1, 4, width=0.25)).eval()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), filled=st.floats(0.01, 0.2))
def test_forward_and_backward_stay_finite_on_random_clouds(lively: MinkUNet14, seed: int, filled: float) -> None:
    _, x = grid(filled, 1, seed)
    assume(len(x.features) > 0)
    lively.zero_grad()
    features = x.features.float().requires_grad_()
    out = lively(x.replace(features))
    weigh(out.features).backward()
    assert out.features.isfinite().all()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    for name, p in lively.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert lively.final.kernel.grad.any()
    assert len(features) < 8 or features.grad.any()  # ReLU may well stop all eight channels of a single voxel


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bfloat16_autocast_stays_close_to_float32(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = load_named_weights(MinkUNet14(16, 8, width=0.25)).to(device).eval()
    _, x = grid(0.3, 16, seed=1)  # in other clouds gradients that nearly cancel lose up to half to rounding
    x = SparseTensor(x.features.float().to(device), x.coordinates.to(device))
    outputs, gradients = [], []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            out = model(x).features
        weigh(out).backward()
        outputs.append(out.detach().float())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 2e-2
    assert all(g.dtype == torch.float32 for g in gradients[1].values())
    # Every layer rounds, so the first ones' gradients err the most; a lost or doubled one errs by 1.
    errors = {name: float((gradients[1][name] - g).norm() / g.norm()) for name, g in gradients[0].items()}
    assert max(errors.values()) < 0.25, errors
    assert sorted(errors.values())[len(errors) // 2] < 0.05, errors
    assert errors["final.kernel"] < 1e-2


def test_results_repeat_bit_for_bit() -> None:
    _, x = grid(0.4, 16)
    layer = Convolution(16, 24, 3).double()
    first, second = layer(x).features, layer(SparseTensor(x.features, x.coordinates)).features
    assert torch.equal(first, second)


def test_global_pooling_matches_a_loop_and_gives_zeros_for_empty_clouds() -> None:
    _, x = grid(0.3, 3)
    apart = SparseTensor(x.features, (x.coordinates * torch.tensor([2, 1, 1, 1])).int())  # clouds 0 and 2
    of_cloud = [x.features[x.coordinates[:, 0] == b] for b in (0, 1)]
    nothing = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(global_mean(apart, 3), torch.stack([of_cloud[0].mean(0), nothing, of_cloud[1].mean(0)]))
    torch.testing.assert_close(global_max(apart, 3), torch.stack([of_cloud[0].amax(0), nothing, of_cloud[1].amax(0)]))


def test_concatenating_tensors_of_other_coordinates_is_refused() -> None:
    with pytest.raises(ValueError, match="same coordinates"):
        concatenate(grid(0.3, 2)[1], grid(0.3, 2)[1])


def test_dense_modules_run_on_features() -> None:
    _, x = grid(0.3, 2)
    out: Any = x.replace(torch.nn.Linear(2, 5).double()(x.features))
    assert out.features.shape[1] == 5
    assert torch.equal(out.coordinates, x.coordinates)


def test_unsupported_kernel_and_stride_are_refused() -> None:
    with pytest.raises(ValueError, match="expected an odd kernel"):
        Convolution(3, 4, kernel_size=3, stride=2)


@pytest.mark.parametrize(
    "layer", [Convolution(4, 6), Convolution(4, 6, 1), Convolution(4, 6, 2, stride=2), TransposedConvolution(4, 6)]
)
def test_features_that_do_not_fit_a_kernel_are_refused_with_both_numbers(layer: nn.Module) -> None:
    cells = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32)
    x = SparseTensor(torch.ones(2, 4), cells)
    if isinstance(layer, TransposedConvolution):
        x.manager.downsample((1, 1, 1), (2, 2, 2))
        x = SparseTensor.on(x.manager, (2, 2, 2), torch.ones(1, 4))
    assert layer(x).features.shape[1] == 6
    with pytest.raises(ValueError, match="got features of 5 channels for a kernel of 4"):
        layer(x.replace(torch.ones(len(x.features), 5)))
    for mixed in (False, True):  # autocast leaves float64 alone
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
            pytest.raises(ValueError, match=r"got torch\.float64 features for a torch\.float32 kernel"),
        ):
            layer(x.replace(x.features.double()))


def test_a_norm_of_other_channels_than_the_kernels_is_refused() -> None:
    cells = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="got features of 16 channels for a kernel of 12"):
        Convolution(12, 6)(SparseTensor(torch.rand(2, 16), cells), BatchNorm(16))
