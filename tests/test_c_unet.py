"""Stage 3: the C-UNet, its forms, its guidance and its losses."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import crossmr
import crossmr.networks
from crossmr.errors import ConfigError
from crossmr.networks.c_unet import (
    ConditionEmbedding,
    CUNet,
    SynthesisConfig,
    deviation_error,
    synthesis_error,
)
from crossmr.networks.unet import ResidualBlock

SMALL = SynthesisConfig(channels=4, multipliers=(1, 2, 2))
LIGHT = SynthesisConfig(channels=4, multipliers=(1, 2, 2), form="light", patch=2)
FORMS = pytest.mark.parametrize("config", [SMALL, LIGHT], ids=["published", "light"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_network(representation_dim=6, dims=2, config=SMALL):
    """A network as it starts."""
    torch.manual_seed(0)
    return CUNet(config, 2, 3, dims, representation_dim=representation_dim)


def randomised(network, only=lambda name: True):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if only(name):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def random_network(representation_dim=6, dims=2, config=SMALL):
    return randomised(a_network(representation_dim, dims, config))


def ones(mask, images):
    """The weight (B, T, *S) of images of which a mask (B, T) says which count."""
    return mask[..., None, None].expand_as(images)


def batch(count=3, side=8):
    generator = seeded(1)
    return (
        torch.rand(count, 2, side, side, generator=generator),
        torch.rand(count, 3, side, side, generator=generator),
        torch.randn(count, 6, generator=generator),
    )


def blocks(network):
    return [module for module in network.modules() if isinstance(module, ResidualBlock)]


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# The network


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("config", [SMALL, LIGHT, replace(SMALL, patch=2), replace(LIGHT, patch=1)], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 9), (8, 9, 24), (8, 8, 16)])
def test_images_of_any_size_come_out_at_that_size(config, dims, size):
    network, size = random_network(dims=dims, config=config), size[-dims:]
    assert network.stride == config.stride
    images, y_0 = torch.randn(2, 2, *size, generator=seeded()), torch.randn(2, 6, generator=seeded(1))
    made = network(images, y_0)
    assert made.shape == (2, 3, *size)
    whole = [-(-side // config.stride) * config.stride for side in size]
    repeated = images
    for axis, side in enumerate(whole, start=2):
        index = torch.arange(side).clamp(max=images.shape[axis] - 1)
        repeated = repeated.index_select(axis, index)
    wanted = network(repeated, y_0)[(..., *(slice(side) for side in size))]
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize(
    ("dims", "shape"), [(2, (2, 8, 8)), (2, (1, 3, 8, 8)), (2, (1, 2, 8, 8, 8)), (3, (2, 2, 8, 8))]
)
def test_images_of_another_shape_are_refused_in_words(dims, shape):
    axes = "Y, X" if dims == 2 else "Z, Y, X"
    with pytest.raises(ValueError, match=re.escape(f"images are {shape}; expected (B, 2, {axes})")):
        a_network(dims=dims)(torch.zeros(shape))
    with pytest.raises(ValueError, match="none of them 0"):
        a_network()(torch.zeros(1, 2, 0, 8))


def test_a_network_is_made_of_a_few_numbers():
    network = crossmr.CUNet(SMALL, in_channels=3)
    assert network(torch.zeros(1, 3, 9, 9)).shape == (1, 1, 9, 9)
    assert crossmr.networks.CUNet is crossmr.CUNet is CUNet
    for wrong in ({"in_channels": 0}, {"out_channels": 0}, {"spatial_dims": 4}):
        with pytest.raises(ConfigError, match="expected"):
            CUNet(SMALL, **wrong)


def test_the_published_form_has_ten_point_four_million_parameters():
    with torch.device("meta"):
        guided = CUNet(SynthesisConfig(), 2, 2, representation_dim=192)
        plain = CUNet(SynthesisConfig(), 2, 2)
    assert parameters(guided) == pytest.approx(10.4e6, rel=0.02)
    assert parameters(plain) == parameters(guided) - sum(p.numel() for p in guided.condition_layers())


@pytest.mark.parametrize("size", [(16, 32), (16, 16, 32)])
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("form", ["published", "light"])
def test_shapes_and_stride(size, patch, form):
    config = SynthesisConfig(channels=4, multipliers=(1, 2, 2), patch=patch, form=form)
    assert config.stride == 4 * patch
    network = random_network(dims=len(size), config=config)
    assert network(torch.rand(2, 2, *size), torch.randn(2, 6)).shape == (2, 3, *size)
    features, _ = network.encoder(torch.rand(1, 2, *size))
    assert features.shape[2:] == tuple(side // config.stride for side in size)


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 0},
        {"blocks": 0},
        {"multipliers": ()},
        {"multipliers": (1, 0)},
        {"condition_width": 0},
        {"patch": 0},
        {"patch": 3},
        {"patch": -2},
        {"lesion_weight": -0.1},
        {"lesion_weight": float("inf")},
        {"lesion_weight": float("nan")},
    ],
)
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SynthesisConfig(**wrong)


# The condition


def test_the_embedding_is_the_papers():
    torch.manual_seed(0)
    embedding, y_0 = ConditionEmbedding(6, 10), torch.randn(2, 6, generator=seeded())
    first, _, second = embedding.embed
    hidden = y_0 @ first.weight.T + first.bias
    want = (hidden * hidden.sigmoid()) @ second.weight.T + second.bias
    torch.testing.assert_close(embedding(y_0), want)


def test_every_residual_block_adds_a_linear_layer_of_silu_of_the_condition():
    """To the output of its first convolution, which the second normalisation reads."""
    network, (sources, _, y_0) = random_network(), batch()
    convolved, read = {}, {}
    for index, block in enumerate(blocks(network)):
        block.conv_1.register_forward_hook(lambda _m, _i, out, k=index: convolved.update({k: out.clone()}))
        block.norm_2.register_forward_pre_hook(lambda _m, given, k=index: read.update({k: given[0].clone()}))
    with torch.no_grad():
        network(sources, y_0)
        c = network.condition(y_0)
        for index, block in enumerate(blocks(network)):
            added = F.linear(c * torch.sigmoid(c), block.condition.weight, block.condition.bias)
            torch.testing.assert_close(read[index], convolved[index] + added[..., None, None], atol=1e-5, rtol=1e-5)
            without_silu = F.linear(c, block.condition.weight, block.condition.bias)
            assert (added - without_silu).abs().amax(1).min() > 0.01
    assert len(read) == 3 + 2 + 6  # encoder, middle, decoder


@FORMS
def test_the_condition_reaches_every_residual_block_and_learns(config):
    network, (sources, targets, y_0) = random_network(config=config), batch()
    synthesis_error(network(sources, y_0), targets, torch.ones_like(targets), absolute=False)[0].backward()
    for block in blocks(network):
        assert block.condition.in_features == 6
        assert block.condition.weight.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in network.condition.parameters())


@FORMS
def test_guidance_changes_the_image_of_its_own_sample_alone(config):
    network, (sources, _, y_0) = random_network(config=config), batch()
    guided, other, none = network(sources, y_0), network(sources, -y_0), network(sources)
    assert (guided - other).abs().amax((1, 2, 3)).min() > 1e-3
    assert (guided - none).abs().amax((1, 2, 3)).min() > 1e-3
    mixed = network(sources, torch.cat([y_0[:1], -y_0[1:2], y_0[2:]]))
    torch.testing.assert_close(mixed, torch.stack([guided[0], other[1], guided[2]]))


def test_a_network_that_nothing_guides_has_no_condition_and_ignores_guidance():
    plain, (sources, _, y_0) = random_network(None), batch()
    assert plain.condition is None
    assert not [name for name, _ in plain.named_parameters() if "condition" in name]
    assert not plain.condition_layers()
    assert torch.equal(plain(sources), plain(sources, y_0))


def test_the_condition_layers_are_all_that_guidance_adds():
    guided, plain = a_network(config=SynthesisConfig(channels=4, condition_width=10)), a_network(None)
    names = {name for name, _ in guided.named_parameters() if "condition" in name}
    assert {id(p) for p in guided.condition_layers()} == {id(p) for n, p in guided.named_parameters() if n in names}
    assert len(names) == 2 * len(blocks(guided)) + 4
    assert guided.condition.embed[2].weight.shape == (10, 10)
    assert {name for name, _ in a_network().named_parameters() if "condition" not in name} == {
        name for name, _ in plain.named_parameters()
    }


@FORMS
def test_a_guided_network_starts_as_one_that_nothing_guides(config):
    guided, plain = (a_network(dim, config=config) for dim in (6, None))
    for name, parameter in plain.named_parameters():
        assert torch.equal(guided.get_parameter(name), parameter), name
    first, *others = [block.condition.weight for block in blocks(guided)]
    assert all(not torch.equal(first, other) for other in others if other.shape == first.shape)


@pytest.mark.parametrize("width", [None, 10])
@FORMS
def test_condition_layers_that_are_trained_last_leave_the_unguided_pass_to_the_bit(config, width):
    config = replace(config, multipliers=(1, 2), condition_width=width)
    network, plain = a_network(config=config), a_network(None, config=config)
    network.zero_condition()
    sources, targets, y_0 = batch()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
            network.get_parameter(name).copy_(parameter)
    want = plain(sources)
    assert torch.equal(network(sources), want)
    assert torch.equal(network(sources, y_0), want)
    optimiser, losses = torch.optim.Adam(network.condition_layers(), 0.1), []
    for _ in range(12):
        loss, count = synthesis_error(network(sources, y_0), targets, torch.ones_like(targets), absolute=False)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach() / count))
    assert losses[-1] < 0.95 * losses[0]
    assert (network(sources, y_0) - want).abs().max() > 1e-2
    assert torch.equal(network(sources), want)


def test_guidance_tells_two_contrasts_apart():
    """One source, two targets that only the guidance can tell apart."""
    torch.manual_seed(0)
    network = CUNet(SynthesisConfig(channels=8, multipliers=(1,)), 1, 1, representation_dim=4)
    source = torch.rand(1, 1, 8, 8, generator=seeded()).expand(2, -1, -1, -1)
    targets, y_0 = torch.cat([source[:1] / 2, source[1:] / 2 + 0.5]), torch.randn(2, 4, generator=seeded(1))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(45):
        optimiser.zero_grad()
        total, count = synthesis_error(network(source, y_0), targets, torch.ones_like(targets), absolute=False)
        (total / count).backward()
        optimiser.step()
    blind = float(((targets - targets.mean(0)) ** 2).mean())  # the least error without guidance
    assert float(total.detach() / count) < 0.5 * blind


# The losses


@pytest.mark.parametrize("absolute", [False, True])
def test_the_loss_is_the_error_of_each_voxel_times_its_weight(absolute):
    prediction, truth = torch.rand(3, 3, 4, 8, generator=seeded()), batch()[1][:, :, :4]
    target_mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    weight = ones(target_mask, truth) * (1 + 2 * (torch.rand(3, 1, 4, 8, generator=seeded(3)) < 0.2))
    error = prediction - truth
    errors = error.abs() if absolute else error.square()
    total, count = synthesis_error(prediction, truth, weight, absolute=absolute)
    torch.testing.assert_close(total, (errors * weight)[target_mask > 0].sum())
    torch.testing.assert_close(count, weight.sum())
    assert count > 6 * 32
    absent = ones(1 - target_mask, truth)
    assert synthesis_error(prediction, truth + 9 * absent, weight, absolute=absolute) == (total, count)
    assert synthesis_error(prediction, truth, 0 * weight, absolute=absolute) == (0, 0)


def test_the_loss_of_half_precision_is_taken_in_full():
    prediction, truth = torch.full((1, 1, 8, 8), 0.5, dtype=torch.bfloat16), torch.full((1, 1, 8, 8), 0.501)
    total, count = synthesis_error(prediction, truth, torch.ones(1, 1, 8, 8), absolute=True)
    deviation = deviation_error(torch.zeros(1, 1, 8, 8), prediction, truth, torch.ones(1, 1, 8, 8))
    assert total.dtype == deviation.dtype == torch.float32
    assert float(total / count) == pytest.approx(1e-3, rel=1e-3)
    assert float(deviation / count) == pytest.approx(1e-3, rel=1e-3)


def test_an_absent_target_teaches_its_channel_nothing():
    network, (sources, targets, y_0) = random_network(), batch()
    weight = ones(torch.tensor([[1.0, 0.0, 1.0]] * 3), targets)
    synthesis_error(network(sources, y_0), targets, weight, absolute=False)[0].backward()
    weight, bias = network.decoder.out.out.weight.grad, network.decoder.out.out.bias.grad
    assert weight[1].abs().max() == 0
    assert bias[1] == 0
    assert weight[[0, 2]].abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("parts", [(1, 2), (1, 1, 1), (3, 0)])
def test_a_batchs_loss_is_the_sum_of_its_parts(parts):
    network, (sources, targets, y_0) = random_network(), batch()
    weight = ones(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), targets)
    with torch.no_grad():
        prediction = network(sources, y_0)
    for measure in (
        lambda p, t, w: torch.stack(synthesis_error(p, t, w, absolute=False)),
        lambda p, t, w: torch.stack(synthesis_error(p, t, w, absolute=True)),
        lambda p, t, w: deviation_error(0.1 * p, p, t, w),
    ):
        whole = measure(prediction, targets, weight)
        pieces = zip(*(value.split(parts) for value in (prediction, targets, weight)), strict=True)
        torch.testing.assert_close(sum(measure(*piece) for piece in pieces), whole, atol=1e-5, rtol=1e-5)


def test_the_likelihood_of_the_error_is_laplaces():
    prediction, truth = torch.randn(3, 2, 4, 4, generator=seeded()), torch.randn(3, 2, 4, 4, generator=seeded(1))
    log_scale, weight = torch.randn(3, 2, 4, 4, generator=seeded(2)), ones(torch.eye(3)[:, :2], truth)
    laplace = torch.distributions.Laplace(prediction, log_scale.exp())
    want = -laplace.log_prob(truth) - torch.log(torch.tensor(2.0))
    torch.testing.assert_close(deviation_error(log_scale, prediction, truth, weight), (want * weight).sum())


def test_the_likeliest_scale_is_the_mean_absolute_error():
    prediction, truth = torch.zeros(1, 1, 40, 40), torch.randn(1, 1, 40, 40, generator=seeded())
    weight = (torch.rand(1, 1, 40, 40, generator=seeded(1)) < 0.5).float()
    wanted = float((truth.abs() * weight).sum() / weight.sum())

    def slope(scale):
        log_scale = torch.tensor(scale).log().requires_grad_()
        deviation_error(log_scale.expand_as(truth), prediction, truth, weight).backward()
        return float(log_scale.grad / weight.sum())

    assert slope(wanted) == pytest.approx(0, abs=1e-5)
    assert slope(1.1 * wanted) > 0.05
    assert slope(0.9 * wanted) < -0.05


def test_the_prediction_does_not_learn_by_the_likelihood_of_its_error():
    prediction, log_scale = (torch.randn(2, 1, 4, 4, generator=seeded(k)).requires_grad_() for k in (0, 1))
    deviation_error(log_scale, prediction, torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).backward()
    assert prediction.grad is None
    assert log_scale.grad.abs().min() > 0
