"""Stage 3: the C-UNet, its guidance, and its unguided twin."""

from dataclasses import replace

import pytest
import torch

from crossmr.errors import ConfigError
from crossmr.layers import ResidualBlock
from crossmr.stages.synthesis import ConditionEmbedding, CUNet, LinearMix, SynthesisConfig

SMALL = SynthesisConfig(channels=4, multipliers=(1, 2, 2))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_network(representation_dim=6, sources=2, targets=3, dims=2):
    torch.manual_seed(0)
    network = CUNet(SMALL, sources, targets, representation_dim, dims)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def batch(count=3, side=8):
    generator = seeded(1)
    return (
        torch.rand(count, 2, side, side, generator=generator),
        torch.rand(count, 3, side, side, generator=generator),
        torch.randn(count, 6, generator=generator),
    )


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_published_form_has_ten_point_four_million_parameters():
    with torch.device("meta"):
        guided = CUNet(SynthesisConfig(), 2, 2, 192)
        twin = CUNet(SynthesisConfig(), 2, 2, None)
        assert guided(torch.zeros(1, 2, 224, 224), torch.zeros(1, 192)).shape == (1, 2, 224, 224)
    assert parameters(guided) == pytest.approx(10.4e6, rel=0.02)
    conditioning = sum(p.numel() for name, p in guided.named_parameters() if "condition" in name)
    assert parameters(twin) == parameters(guided) - conditioning


def test_the_twin_has_no_condition_and_ignores_guidance():
    twin = random_network(None)
    assert not [name for name, _ in twin.named_parameters() if "condition" in name or "guidance" in name]
    sources, _, y_0 = batch()
    assert torch.equal(twin(sources), twin(sources, y_0))


def test_every_residual_block_is_told_the_condition():
    blocks = [module for module in random_network().modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 3 + 2 + 6  # encoder, middle, decoder
    for block in blocks:
        assert isinstance(block.condition, torch.nn.Linear)
        assert block.condition.in_features == 6


def test_the_condition_reaches_every_residual_block():
    network = random_network()
    sources, targets, y_0 = batch()
    network.loss(sources, targets, torch.ones(3, 3), y_0).backward()
    for name, module in network.named_modules():
        if isinstance(module, ResidualBlock):
            assert module.condition.weight.grad.abs().max() > 0, name
    assert network.condition.embed[0].weight.grad.abs().max() > 0


def test_the_embedding_is_the_papers():
    torch.manual_seed(0)
    embedding = ConditionEmbedding(6, 6)
    y_0 = torch.randn(2, 6, generator=seeded())
    first, _, second = embedding.embed
    hidden = y_0 @ first.weight.T + first.bias
    want = (hidden * hidden.sigmoid()) @ second.weight.T + second.bias
    torch.testing.assert_close(embedding(y_0, 2), want)


@pytest.mark.parametrize("size", [(8, 12), (4, 8, 12)])
def test_shapes(size):
    network = random_network(dims=len(size))
    assert network(torch.rand(2, 2, *size), torch.randn(2, 6)).shape == (2, 3, *size)
    assert SMALL.divisor == 4


def test_guidance_changes_the_image():
    network, (sources, _, y_0) = random_network(), batch()
    guided, other = network(sources, y_0), network(sources, -y_0)
    assert (guided - other).abs().amax((1, 2, 3)).min() > 1e-3


def test_no_guidance_is_all_guidance_withheld():
    network, (sources, _, y_0) = random_network(), batch()
    none = network(sources)
    assert torch.equal(none, network(sources, y_0, torch.zeros(3, 1)))
    guided = network(sources, y_0)
    assert torch.equal(guided, network(sources, y_0, torch.ones(3, 1)))
    mixed = network(sources, y_0, torch.tensor([[1.0], [0.0], [1.0]]))
    torch.testing.assert_close(mixed, torch.stack([guided[0], none[1], guided[2]]))
    assert (guided - none).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_loss_is_the_mean_squared_error_of_what_is_there():
    network, (sources, targets, y_0) = random_network(), batch()
    errors = ((network(sources, y_0) - targets) ** 2).mean((2, 3))
    torch.testing.assert_close(network.loss(sources, targets, torch.ones(3, 3), y_0), errors.mean())
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    want = errors[present > 0].mean()
    loss = network.loss(sources, targets, present, y_0)
    torch.testing.assert_close(loss, want)
    absent = (1 - present)[..., None, None]
    assert torch.equal(network.loss(sources, targets + 9 * absent, present, y_0), loss)


def test_an_absent_target_teaches_its_channel_nothing():
    network, (sources, targets, y_0) = random_network(), batch()
    network.loss(sources, targets, torch.tensor([[1.0, 0.0, 1.0]] * 3), y_0).backward()
    weight, bias = network.decoder.out.weight.grad, network.decoder.out.bias.grad
    assert weight[1].abs().max() == 0
    assert bias[1] == 0
    assert weight[[0, 2]].abs().amax((1, 2, 3)).min() > 0


def test_a_batch_without_targets_has_loss_zero():
    network, (sources, targets, y_0) = random_network(), batch()
    assert network.loss(sources, targets, torch.zeros(3, 3), y_0) == 0


def test_the_loss_falls_and_guidance_tells_two_contrasts_apart():
    """One source, two targets that only the guidance can tell apart."""
    torch.manual_seed(0)
    network = CUNet(SynthesisConfig(channels=4, multipliers=(1, 2)), 1, 1, 4)
    source = torch.rand(1, 1, 8, 8, generator=seeded()).expand(2, -1, -1, -1)
    targets, y_0 = torch.cat([source[:1], 1 - source[:1]]), torch.randn(2, 4, generator=seeded(1))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        network.loss(source, targets, torch.ones(2, 1), y_0).backward()
        optimiser.step()
    blind = float(((targets - targets.mean(0)) ** 2).mean())  # the least error without guidance
    assert float(network.loss(source, targets, torch.ones(2, 1), y_0).detach()) < 0.5 * blind


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"blocks": 0}, {"multipliers": ()}, {"multipliers": (1, 0)}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SynthesisConfig(**wrong)


# Guidance by a grid of cells


def grids(count=3, cells=(4, 4)):
    return torch.randn(count, 6, *cells, generator=seeded(2))


def test_a_grid_is_embedded_cell_by_cell():
    torch.manual_seed(0)
    embedding, y_0 = ConditionEmbedding(6, 6), grids()
    with torch.no_grad():
        embedding.no_guidance.normal_()
    c = embedding(y_0, 3)
    assert c.shape == y_0.shape
    torch.testing.assert_close(c[:, :, 1, 3], embedding(y_0[:, :, 1, 3], 3))
    withheld = embedding(y_0, 3, torch.tensor([[1.0], [0.0], [1.0]]))
    assert torch.equal(withheld[0], c[0])
    assert torch.equal(withheld[1], embedding.no_guidance[:, None, None].expand(6, 4, 4))


@pytest.mark.parametrize("size", [(8, 12), (4, 8, 12)])
def test_a_grid_of_equal_cells_guides_as_a_vector_does(size):
    network, sources = random_network(dims=len(size)), torch.rand(3, 2, *size, generator=seeded())
    y_0 = grids()[:, :, 0, 0]
    equal = y_0[(...,) + (None,) * len(size)].expand(3, 6, *[side // 4 for side in size])
    torch.testing.assert_close(network(sources, equal), network(sources, y_0), atol=1e-4, rtol=1e-4)
    withheld = network(sources, equal, torch.zeros(3, 1))
    torch.testing.assert_close(withheld, network(sources), atol=1e-4, rtol=1e-4)


def test_a_cell_moves_mostly_the_pixels_near_it():
    network, y_0 = random_network(), grids(cells=(8, 8))
    sources = torch.rand(3, 2, 64, 64, generator=seeded())
    other = y_0.clone()
    other[1, :, 0, 7] += 3
    with torch.no_grad():
        moved = (network(sources, other) - network(sources, y_0)).abs().mean(1)
        keep = torch.zeros(3, 1)
        assert torch.equal(network(sources, other, keep), network(sources, y_0, keep))
    assert moved[[0, 2]].max() == 0
    assert moved[1, :8, 56:].mean() > 5 * moved[1, 32:, :32].mean()


# Condition layers that learn last


def guided_last(width=None):
    torch.manual_seed(0)
    config = SynthesisConfig(channels=4, multipliers=(1, 2, 3), condition_width=width)
    return CUNet(config, 2, 3, 6, guided_last=True)


@pytest.mark.parametrize("width", [None, 10])
@pytest.mark.parametrize("cells", [(), (2, 2)])
def test_condition_layers_start_at_nothing_and_learn_alone(cells, width):
    network, (sources, targets, vector) = guided_last(width), batch()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "condition" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    y_0, want = grids(cells=cells) if cells else vector, network(sources)
    assert torch.equal(network(sources, y_0), want)
    network.condition_layers_only()
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(20):
        loss = network.loss(sources, targets, torch.ones(3, 3), y_0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert (network(sources, y_0) - want).abs().max() > 1e-2
    assert torch.equal(network(sources), want)  # unguided it stays what it was, to the bit


def test_only_what_lets_the_guidance_in_learns_last():
    network = guided_last(10)
    network.condition_layers_only()
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    blocks = sum(isinstance(module, ResidualBlock) for module in network.modules())
    assert len(learning) == 2 * blocks + 4
    assert "condition.embed.0.weight" in learning
    assert network.condition.embed[2].weight.shape == (10, 10)
    assert not [name for name, _ in network.named_parameters() if "no_guidance" in name]


# What it starts from


@pytest.mark.parametrize("dims", [2, 3])
def test_a_residual_network_starts_as_the_least_squares_mix(dims):
    mix = LinearMix(2, 3)
    mix.weights.copy_(torch.randn(1, 3, 3))
    network = CUNet(SMALL, 2, 3, 6, dims, mix=mix)
    sources = torch.rand(2, 2, *[8] * dims)
    want = torch.einsum("bs...,st->bt...", sources, mix.weights[0, :2])
    want = want + mix.weights[0, 2].reshape(-1, *[1] * dims)
    torch.testing.assert_close(network(sources, torch.randn(2, 6)), want)
    assert "mix.weights" in network.state_dict()
    assert not any(name.startswith("mix") for name, _ in network.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):  # half a promille of the intensity range would show
        torch.testing.assert_close(network(sources), want, atol=1e-6, rtol=1e-6)


def test_each_subset_of_the_sources_has_a_mix_of_its_own():
    mix = LinearMix(3, 2, 3, any_subset=True)
    assert mix.weights.shape == (8, 4, 2)
    mix.weights.copy_(torch.randn(8, 4, 2))
    around, shown = torch.rand(2, 9, 4, 4), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    maps = shown[:, :, None, None].expand(-1, -1, 4, 4)
    inputs = torch.cat([around * maps.repeat_interleave(3, 1), maps], 1)
    made = mix(inputs)[:, :, 1]
    for row, (pattern, channels) in enumerate(((5, (0, 2)), (2, (1,)))):
        want = sum(around[row, 3 * s + 1] * mix.weights[pattern, s, 0] for s in channels) + mix.weights[pattern, 3, 0]
        torch.testing.assert_close(made[row, 0], want)


def test_what_is_not_shown_is_seen_as_the_mix_slice_by_slice():
    mix = LinearMix(3, 3, 3, any_subset=True)
    mix.weights.copy_(torch.randn(8, 4, 3))
    around, shown = torch.rand(2, 3, 3, 4, 4), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    maps = 0.1 * shown[:, :, None, None].expand(-1, -1, 4, 4)
    inputs = torch.cat([(around * shown[:, :, None, None, None]).flatten(1, 2), maps], 1)
    filled = mix.fill(inputs, mix(inputs))
    assert torch.equal(filled[:, 9:], maps)
    seen = filled[:, :9].unflatten(1, (3, 3))
    for row, (pattern, channels) in enumerate(((5, (0, 2)), (2, (1,)))):
        for number in range(3):
            weights = mix.weights[pattern, :, number]
            want = sum(around[row, s] * weights[s] for s in channels) + weights[3]
            torch.testing.assert_close(seen[row, number], around[row, number] if number in channels else want)


def test_a_network_of_any_subset_reads_the_mix_of_neighbouring_slices_too():
    mix = LinearMix(2, 2, 3, any_subset=True)
    mix.weights.copy_(torch.randn(4, 3, 2))
    network = CUNet(SMALL, 8, 2, None, mix=mix)
    read = []
    network.encoder.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    around = torch.rand(1, 6, 8, 8)
    around[:, 3:] = 0
    maps = torch.tensor([0.1, 0.0])[None, :, None, None].expand(-1, -1, 8, 8)
    network(torch.cat([around, maps], 1))
    want = around[:, :3] * mix.weights[1, 0, 1] + mix.weights[1, 2, 1]
    torch.testing.assert_close(read[0][:, 3:6], want)


@pytest.mark.parametrize("loss", ["squared", "absolute"])
def test_the_loss_is_the_squared_or_the_absolute_error_of_what_is_present(loss):
    network = CUNet(replace(SMALL, loss=loss), 2, 3, None)
    sources, targets = torch.rand(2, 2, 8, 8), torch.rand(2, 3, 8, 8)
    present = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    error = (network(sources) - targets)[present > 0]
    want = error.abs().mean() if loss == "absolute" else error.square().mean()
    torch.testing.assert_close(network.loss(sources, targets, present), want)
