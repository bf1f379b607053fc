"""Stage 3: the C-UNet, its guidance, and the linear regression that it may start from."""

import pytest
import torch
from torch.nn import functional as F

from crossmr.errors import ConfigError
from crossmr.networks.c_unet import (
    ConditionEmbedding,
    CUNet,
    LinearRegression,
    SynthesisConfig,
    availability,
    masked_sum,
    synthesis_error,
)
from crossmr.networks.unet import ResidualBlock

SMALL = SynthesisConfig(channels=4, multipliers=(1, 2, 2))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_network(representation_dim=6, dims=2, config=SMALL, **settings):
    """A network as it starts."""
    torch.manual_seed(0)
    return CUNet(config, 2, 3, dims, representation_dim=representation_dim, **settings)


def randomised(network, only=lambda name: True):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if only(name):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def random_network(representation_dim=6, dims=2, **settings):
    return randomised(a_network(representation_dim, dims, **settings))


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


def test_the_published_form_has_ten_point_four_million_parameters():
    with torch.device("meta"):
        guided = CUNet(SynthesisConfig(), 2, 2, representation_dim=192)
        plain = CUNet(SynthesisConfig(), 2, 2)
    assert parameters(guided) == pytest.approx(10.4e6, rel=0.02)
    assert parameters(plain) == parameters(guided) - sum(p.numel() for p in guided.condition_layers())


@pytest.mark.parametrize("size", [(8, 12), (4, 8, 12)])
def test_shapes(size):
    network = random_network(dims=len(size))
    assert network(torch.rand(2, 2, *size), torch.randn(2, 6)).shape == (2, 3, *size)
    assert SMALL.stride == 4


@pytest.mark.parametrize(
    "wrong", [{"channels": 0}, {"blocks": 0}, {"multipliers": ()}, {"multipliers": (1, 0)}, {"condition_width": 0}]
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


def test_the_condition_reaches_every_residual_block_and_learns():
    network, (sources, targets, y_0) = random_network(), batch()
    synthesis_error(network(sources, y_0), targets, torch.ones(3, 3), absolute=False)[0].backward()
    for block in blocks(network):
        assert block.condition.in_features == 6
        assert block.condition.weight.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in network.condition.parameters())


def test_guidance_changes_the_image_of_its_own_sample_alone():
    network, (sources, _, y_0) = random_network(), batch()
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


@pytest.mark.parametrize("residual", [True, False])
def test_a_guided_network_starts_as_one_that_nothing_guides(residual):
    regression = LinearRegression(2, 3) if residual else None
    guided, plain = (a_network(dim, regression=regression) for dim in (6, None))
    for name, parameter in plain.named_parameters():
        assert torch.equal(guided.get_parameter(name), parameter), name
    first, *others = [block.condition.weight for block in blocks(guided)]
    assert all(not torch.equal(first, other) for other in others if other.shape == first.shape)


@pytest.mark.parametrize("width", [None, 10])
def test_condition_layers_that_are_trained_last_leave_the_unguided_pass_to_the_bit(width):
    config = SynthesisConfig(channels=4, multipliers=(1, 2), condition_width=width)
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
        loss, count = synthesis_error(network(sources, y_0), targets, torch.ones(3, 3), absolute=False)
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
        total, count = synthesis_error(network(source, y_0), targets, torch.ones(2, 1), absolute=False)
        (total / count).backward()
        optimiser.step()
    blind = float(((targets - targets.mean(0)) ** 2).mean())  # the least error without guidance
    assert float(total.detach() / count) < 0.5 * blind


# The loss


@pytest.mark.parametrize("absolute", [False, True])
def test_the_loss_is_the_mean_error_of_each_image_that_is_a_target(absolute):
    prediction, truth = torch.rand(3, 3, 4, 8, generator=seeded()), batch()[1][:, :, :4]
    target_mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    error = prediction - truth
    errors = (error.abs() if absolute else error.square()).mean((2, 3))
    total, count = synthesis_error(prediction, truth, target_mask, absolute=absolute)
    torch.testing.assert_close(total, errors[target_mask > 0].sum())
    assert count == 6
    absent = (1 - target_mask)[..., None, None]
    assert synthesis_error(prediction, truth + 9 * absent, target_mask, absolute=absolute) == (total, count)
    assert synthesis_error(prediction, truth, torch.zeros(3, 3), absolute=absolute) == (0, 0)


def test_the_loss_of_half_precision_is_taken_in_full():
    prediction, truth = torch.full((1, 1, 8, 8), 0.5, dtype=torch.bfloat16), torch.full((1, 1, 8, 8), 0.501)
    total, _ = synthesis_error(prediction, truth, torch.ones(1, 1), absolute=True)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


def test_an_absent_target_teaches_its_channel_nothing():
    network, (sources, targets, y_0) = random_network(), batch()
    mask = torch.tensor([[1.0, 0.0, 1.0]] * 3)
    synthesis_error(network(sources, y_0), targets, mask, absolute=False)[0].backward()
    weight, bias = network.decoder.out.weight.grad, network.decoder.out.bias.grad
    assert weight[1].abs().max() == 0
    assert bias[1] == 0
    assert weight[[0, 2]].abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("parts", [(1, 2), (1, 1, 1), (3, 0)])
def test_a_batchs_loss_is_the_sum_of_its_parts(parts):
    network, (sources, targets, y_0) = random_network(), batch()
    target_mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        prediction = network(sources, y_0)
    for measure, values in (
        (lambda p, t, m: synthesis_error(p, t, m, absolute=False), (prediction, targets)),
        (lambda p, t, m: synthesis_error(p, t, m, absolute=True), (prediction, targets)),
        (masked_sum, (prediction,)),
    ):
        whole = torch.stack(measure(*values, target_mask))
        each = [
            torch.stack(measure(*part))
            for part in zip(*(value.split(parts) for value in (*values, target_mask)), strict=True)
        ]
        torch.testing.assert_close(sum(each), whole, atol=1e-6, rtol=1e-6)


# What it starts from


@pytest.mark.parametrize("dims", [2, 3])
def test_a_residual_network_starts_as_the_least_squares_regression(dims):
    regression = LinearRegression(2, 3)
    regression.weights.copy_(torch.randn(1, 3, 3))
    network = a_network(dims=dims, regression=regression)
    sources = torch.rand(2, 2, *[8] * dims)
    want = torch.einsum("bs...,st->bt...", sources, regression.weights[0, :2])
    want = want + regression.weights[0, 2].reshape(-1, *[1] * dims)
    torch.testing.assert_close(network(sources, torch.randn(2, 6)), want)
    assert "regression.weights" in network.state_dict()
    assert not any(name.startswith("regression") for name, _ in network.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):  # half a promille of the intensity range would show
        torch.testing.assert_close(network(sources), want, atol=1e-6, rtol=1e-6)


def test_availability_is_read_off_the_maps_at_the_end_of_the_inputs():
    inputs = torch.rand(2, 6 + 3, 4, 4)
    inputs[:, 6:] = 0.1 * torch.tensor([[1.0, 0, 1], [0, 1, 0]])[..., None, None]
    assert availability(inputs, 3).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_each_subset_of_the_sources_has_a_regression_of_its_own():
    regression = LinearRegression(3, 2, 3, any_subset=True)
    assert regression.weights.shape == (8, 4, 2)
    regression.weights.copy_(torch.randn(8, 4, 2))
    neighbours, available = torch.rand(2, 9, 4, 4), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    maps = available[:, :, None, None].expand(-1, -1, 4, 4)
    inputs = torch.cat([neighbours * maps.repeat_interleave(3, 1), maps], 1)
    predicted = regression(inputs)[:, :, 1]
    for row, (pattern, channels) in enumerate(((5, (0, 2)), (2, (1,)))):
        weights = regression.weights[pattern, :, 0]
        want = sum(neighbours[row, 3 * s + 1] * weights[s] for s in channels) + weights[3]
        torch.testing.assert_close(predicted[row, 0], want)


def test_what_is_missing_is_filled_with_the_regression_slice_by_slice():
    regression = LinearRegression(3, 3, 3, any_subset=True)
    regression.weights.copy_(torch.randn(8, 4, 3))
    neighbours, available = torch.rand(2, 3, 3, 4, 4), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    maps = 0.1 * available[:, :, None, None].expand(-1, -1, 4, 4)
    inputs = torch.cat([(neighbours * available[:, :, None, None, None]).flatten(1, 2), maps], 1)
    filled = regression.fill(inputs, regression(inputs))
    assert torch.equal(filled[:, 9:], maps)
    images = filled[:, :9].unflatten(1, (3, 3))
    for row, (pattern, channels) in enumerate(((5, (0, 2)), (2, (1,)))):
        for number in range(3):
            weights = regression.weights[pattern, :, number]
            want = sum(neighbours[row, s] * weights[s] for s in channels) + weights[3]
            torch.testing.assert_close(images[row, number], neighbours[row, number] if number in channels else want)


def test_a_network_of_any_subset_reads_the_regression_of_neighbouring_slices_too():
    regression = LinearRegression(2, 2, 3, any_subset=True)
    regression.weights.copy_(torch.randn(4, 3, 2))
    network = CUNet(SMALL, 8, 2, regression=regression)
    read = []
    network.encoder.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    neighbours = torch.rand(1, 6, 8, 8)
    neighbours[:, 3:] = 0
    maps = torch.tensor([0.1, 0.0])[None, :, None, None].expand(-1, -1, 8, 8)
    network(torch.cat([neighbours, maps], 1))
    want = neighbours[:, :3] * regression.weights[1, 0, 1] + regression.weights[1, 2, 1]
    torch.testing.assert_close(read[0][:, 3:6], want)
