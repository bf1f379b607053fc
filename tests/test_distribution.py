"""Stage 2: a small MDN learns a distribution of two clusters, and which of them a condition means."""

import pytest
import torch

from crossmr.diffusion import Schedule, q_sample
from crossmr.errors import ConfigError
from crossmr.stages.distribution import (
    DistributionConfig,
    DistributionNetwork,
    GridBlock,
    MLPBlock,
    step_embedding,
)

CENTRES = torch.tensor([[2.0, 1.0, -1.0], [-2.0, -1.0, 1.0]])
SPREAD = 0.4
CONFIG = DistributionConfig(width=64, blocks=2, condition_dropout=0.3, schedule=Schedule(steps=1000))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(count, start=0):
    return [seeded(start + k) for k in range(count)]


def clusters(count, generator):
    """Points near one of two centres, and the condition that tells which (one-hot)."""
    which = torch.randint(2, (count,), generator=generator)
    return CENTRES[which] + SPREAD * torch.randn(count, 3, generator=generator), torch.eye(2)[which]


def nearest(points):
    return torch.cdist(points, CENTRES).argmin(1)


def random_network(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    network = DistributionNetwork(config, 3, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def exact_denoiser(y_t, alpha_bar):
    """E[y_0 | y_t] of the two clusters together: no network without the condition can do better."""
    a = alpha_bar[:, None]
    variance = a * SPREAD**2 + 1 - a
    away = y_t[:, None] - a.sqrt()[..., None] * CENTRES  # (B, 2, D)
    weight = torch.softmax(-(away**2).sum(-1) / (2 * variance), dim=1)
    posterior = CENTRES + (a.sqrt() * SPREAD**2 / variance)[..., None] * away
    return (weight[..., None] * posterior).sum(1)


@pytest.fixture(scope="module")
def trained():
    """A network and its losses of 600 steps."""
    torch.manual_seed(0)
    network, generator, losses = DistributionNetwork(CONFIG, 3, 2), seeded(), []
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.02, total_iters=600)
    for _ in range(600):
        y_0, condition = clusters(128, generator)
        loss = network.loss(y_0, condition, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        losses.append(float(loss.detach()))
    return network, losses


def test_the_loss_falls(trained):
    _, losses = trained
    assert losses[0] == pytest.approx(2 + SPREAD**2, rel=0.2)  # it starts by predicting zero
    assert sum(losses[-50:]) / 50 < 0.3 * losses[0]


def test_the_prediction_comes_near_the_exact_denoisers(trained):
    network, _ = trained
    y_0, condition = clusters(4000, seeded(5))
    t = torch.randint(1000, (4000,), generator=seeded(6))
    y_t = q_sample(y_0, torch.randn(y_0.shape, generator=seeded(7)), network.alpha_bar[t])
    with torch.no_grad():
        blind, told = ((network(y_t, t, c) - y_0).square().mean() for c in (None, condition))
    best = (exact_denoiser(y_t, network.alpha_bar[t]) - y_0).square().mean()
    assert best - 0.01 < blind < 1.05 * best
    assert told < 0.2 * best


def test_conditional_samples_follow_the_condition(trained):
    network, _ = trained
    which = torch.arange(64) % 2
    points = network.sample(generators(64), torch.eye(2)[which], steps=20)  # (64, 3)
    assert points.shape == (64, 3)
    assert (nearest(points) == which).float().mean() > 0.98
    for k in (0, 1):
        torch.testing.assert_close(points[which == k].mean(0), CENTRES[k], atol=0.15, rtol=0)


def test_unconditional_samples_of_the_same_network_cover_both_clusters(trained):
    network, _ = trained
    points = network.sample(generators(128), None, steps=50)
    assert 0.35 < nearest(points).float().mean() < 0.65
    distance = torch.cdist(points, CENTRES).amin(1)
    assert distance.quantile(0.9) < 2 * SPREAD  # against 4.9 between the centres


def test_samples_of_one_condition_differ_but_little(trained):
    network, _ = trained
    points = network.sample(generators(64), torch.eye(2)[[0] * 64], steps=20)
    assert points.unique(dim=0).shape == (64, 3)
    assert points.std(0).max() < SPREAD


def test_a_row_depends_on_its_generator_alone(trained):
    network, _ = trained
    condition = torch.eye(2)[[0, 1, 0, 1]]
    batch = network.sample(generators(4), condition, steps=5)
    single = [network.sample([seeded(k)], condition[k : k + 1], steps=5) for k in range(4)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch, network.sample(generators(4), condition, steps=5), atol=0, rtol=0)
    other = network.sample(generators(4, start=10), condition, steps=5)
    assert (batch - other).abs().amax(1).min() > 1e-4


def test_without_noise_the_first_draw_decides(trained):
    network, _ = trained
    rough, fine = (network.sample(generators(2), None, steps=s, eta=0.0) for s in (100, 200))
    assert torch.equal(nearest(rough), nearest(fine))


def test_sampling_leaves_no_graph(trained):
    network, _ = trained
    assert not network.sample(generators(1), None, steps=2).requires_grad


def test_keep_withholds_the_condition():
    network = random_network()
    y_t, t, condition = (
        torch.randn(3, 3, generator=seeded()),
        torch.tensor([1, 500, 999]),
        torch.eye(2)[[0, 1, 0]],
    )
    none, told = network(y_t, t), network(y_t, t, condition)
    assert (none - told).abs().amax(1).min() > 1e-3
    mixed = network(y_t, t, condition, torch.tensor([[0.0], [1.0], [0.0]]))
    torch.testing.assert_close(mixed, torch.stack([none[0], told[1], none[2]]))
    withheld = network(y_t, t, condition, torch.zeros(3, 1))
    assert torch.equal(withheld, network(y_t, t, condition + 5, torch.zeros(3, 1)))


@pytest.mark.parametrize(("dropout", "listens"), [(0.0, True), (1.0, False)])
def test_the_loss_withholds_the_share_it_was_told(dropout, listens):
    network = random_network(DistributionConfig(width=16, blocks=1, condition_dropout=dropout))
    y_0, condition = clusters(64, seeded(3))
    network.loss(y_0, condition, seeded(4)).backward()
    assert bool(network.embed_condition.weight.grad.abs().max() > 0) == listens
    assert bool(network.no_condition.grad.abs().max() > 0) != listens


def test_condition_dropout_is_a_share_of_the_samples():
    network, kept = random_network(), []
    network.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[3]))
    y_0, condition = clusters(4000, seeded())
    network.loss(y_0, condition, seeded(1))
    assert float(kept[0].mean()) == pytest.approx(0.7, abs=0.03)


def test_the_loss_is_drawn_from_its_generator():
    network = random_network()
    y_0, condition = clusters(8, seeded())
    first, again, other = (float(network.loss(y_0, condition, seeded(s)).detach()) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_unconditional_network_has_nothing_to_tell():
    network = random_network(DistributionConfig(width=16, blocks=1, conditional=False))
    assert not [name for name, _ in network.named_parameters() if "condition" in name]
    assert network.loss(*clusters(4, seeded()), seeded()).isfinite()
    assert network.sample(generators(2), steps=3).shape == (2, 3)


def test_the_step_and_every_parameter_matter():
    network = random_network()
    y_t = torch.randn(1, 3, generator=seeded()).expand(3, -1)
    predicted = network(y_t, torch.tensor([0, 400, 999]))
    assert torch.cdist(predicted, predicted)[0, 1:].min() > 1e-3
    network.loss(*clusters(64, seeded()), seeded()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_steps_are_embedded_apart():
    embedded = step_embedding(torch.arange(1000), 64)
    assert embedded.shape == (1000, 64)
    torch.testing.assert_close(embedded[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    distance = torch.cdist(embedded, embedded) + 10 * torch.eye(1000)
    assert distance.min() > 0.1


def test_the_schedule_is_no_weight_and_the_size_is_the_papers():
    with torch.device("meta"):
        network = DistributionNetwork(DistributionConfig(), 192, 192)
    assert "alpha_bar" not in network.state_dict()
    blocks = [block for block in network.blocks if isinstance(block, MLPBlock)]
    assert len(blocks) == 12
    assert all(block.linear.weight.shape == (1536, 1536) for block in blocks)


@pytest.mark.parametrize("wrong", [{"width": 7}, {"width": 0}, {"blocks": 0}, {"condition_dropout": 1.5}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DistributionConfig(**wrong)


# Grids, and features of other scales


def grid_network(dims=2):
    """A random network over grids of 3 features, told grids of 2."""
    torch.manual_seed(0)
    network = DistributionNetwork(DistributionConfig(width=16, blocks=2, condition_dropout=0.3), 3, 2, dims)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 1)])
def test_a_grid_depends_on_its_generator_and_condition_alone(grid):
    network, condition = grid_network(len(grid)), torch.randn(3, 2, *grid, generator=seeded())
    batch = network.sample(generators(3), condition, grid=grid, steps=4)
    assert batch.shape == (3, 3, *grid)
    single = [network.sample([seeded(k)], condition[k : k + 1], grid=grid, steps=4) for k in range(3)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=1e-5)
    for other in (
        network.sample(generators(3), None, grid=grid, steps=4),
        network.sample(generators(3), condition.flip(0), grid=grid, steps=4),
        network.sample(generators(3, start=10), condition, grid=grid, steps=4),
    ):
        assert (batch - other).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-3


def test_a_grid_block_starts_as_the_identity_and_then_asks_the_neighbours():
    torch.manual_seed(0)
    block, x, addition = GridBlock(2, 8), torch.randn(1, 8, 9, 9), torch.randn(1, 8, 1, 1)
    assert torch.equal(block(x, addition), x)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        addition = block.embedding(torch.nn.functional.silu(addition))
    changed = x.clone()
    changed[0, :, 4, 4] += 1 + torch.randn(8)
    moved = (block(changed, addition) - block(x, addition)).abs().mean((0, 1))
    far = moved[:, :2].mean()  # by the normalisation alone
    assert moved[3:6, 3:6].mean() > 5 * far
    assert moved[2, 2:7].mean() > 3 * far  # two convolutions reach two cells
    assert not torch.allclose(block(x, addition.flip(1)), block(x, addition), atol=1e-2)


def test_keep_withholds_the_condition_of_a_grid():
    network, t = grid_network(), torch.tensor([1, 500, 999])
    y_t, condition = torch.randn(3, 3, 2, 4, generator=seeded()), torch.randn(3, 2, 2, 4, generator=seeded(1))
    none, told = network(y_t, t), network(y_t, t, condition)
    assert (none - told).flatten(1).abs().amax(1).min() > 1e-3
    mixed = network(y_t, t, condition, torch.tensor([[0.0], [1.0], [0.0]]))
    torch.testing.assert_close(mixed, torch.stack([none[0], told[1], none[2]]))


def test_every_parameter_of_a_network_over_grids_learns():
    network = grid_network()
    y_0, condition = torch.randn(16, 3, 4, 4, generator=seeded()), torch.randn(16, 2, 4, 4, generator=seeded(1))
    network.loss(y_0, condition, seeded(2)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("grid", [(), (2, 4)])
def test_standardised_the_unit_of_a_feature_does_not_matter(grid):
    network = grid_network() if grid else random_network()
    cells = (...,) + (None,) * len(grid)
    y_0, condition = torch.randn(64, 3, *grid, generator=seeded()), torch.randn(64, 2, *grid, generator=seeded(1))
    gain, shift = torch.tensor([0.01, 3.0, 40.0])[cells], torch.tensor([5.0, -2.0, 0.3])[cells]

    def measured(vectors):
        network.standardise(vectors)
        loss = float(network.loss(vectors, condition, seeded(2)).detach())
        return loss, network.sample(generators(2), condition[:2], grid=grid, steps=4)

    (loss, drawn), (again, mapped) = measured(y_0), measured(gain * y_0 + shift)
    assert again == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(mapped, gain * drawn + shift, atol=1e-3, rtol=1e-3)
    network.standardise(torch.zeros_like(y_0))
    assert network.loss(y_0, condition, seeded(2)).isfinite()


def test_a_standardised_network_that_learnt_nothing_draws_the_mean():
    torch.manual_seed(0)
    network, y_0 = DistributionNetwork(CONFIG, 3, 2, 2), 4 + 2 * torch.randn(50, 3, 2, 2, generator=seeded())
    network.standardise(y_0)
    mean = y_0.mean((0, 2, 3))
    torch.testing.assert_close(
        network.sample(generators(5), grid=(2, 2), steps=3), mean[:, None, None].expand(5, 3, 2, 2)
    )
    torch.testing.assert_close(network.state_dict()["centre"], mean)  # it comes back with the weights
    torch.testing.assert_close(network.state_dict()["scale"], y_0.movedim(1, -1).reshape(-1, 3).std(0, unbiased=False))
    assert float(network.loss(y_0, None, seeded()).detach()) == pytest.approx(1, abs=1e-4)  # all of the variance


@pytest.mark.parametrize("grid", [(), (3, 2)])
def test_what_is_not_wanted_brings_no_loss_and_comes_out_as_the_mean(grid):
    network = DistributionNetwork(DistributionConfig(width=16, blocks=1), 4, 2, len(grid))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    y_0, told = torch.randn(6, 4, *grid), torch.randn(6, 2, *grid)
    wanted = torch.tensor([[1.0, 1, 0, 1]] * 3 + [[0.0, 1, 1, 1]] * 3)
    network.standardise(y_0, wanted)
    kept = y_0[:, 2][3:]
    torch.testing.assert_close(network.centre[2], kept.mean())
    torch.testing.assert_close(network.scale[2], kept.std(unbiased=False))
    changed = y_0.clone()
    changed[:3, 2], changed[3:, 0] = 50, -50

    def loss(vectors, chosen):
        return network.loss(vectors, told, torch.Generator().manual_seed(1), chosen)

    assert torch.equal(loss(changed, wanted), loss(y_0, wanted))
    assert (loss(changed, None) - loss(y_0, None)).abs() > 1
    torch.testing.assert_close(loss(y_0, None), loss(y_0, torch.ones(6, 4)))
    generators = [torch.Generator().manual_seed(k) for k in range(6)]
    drawn = network.sample(generators, told, grid=grid, wanted=wanted, steps=3)
    for row, column in ((0, 2), (3, 0)):
        torch.testing.assert_close(drawn[row, column], network.centre[column].expand(grid))
    assert (drawn[0, 0] - network.centre[0]).abs().max() > 1e-2


def test_what_all_steps_add_is_what_each_adds_by_itself():
    torch.manual_seed(0)
    network = DistributionNetwork(DistributionConfig(width=16, blocks=2), 3, 2)
    condition = torch.randn(2, 2)
    at_once = network._all_additions([900, 5], 2, condition)
    for step in (900, 5):
        alone = network.additions(torch.full((2,), step), condition)
        for one, other in zip(at_once[step], alone, strict=True):
            torch.testing.assert_close(one, other)


def test_a_vector_is_drawn_in_full_precision_within_mixed():
    torch.manual_seed(0)
    network = DistributionNetwork(DistributionConfig(width=16, blocks=2), 3, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    plain = network.sample(generators(3), torch.ones(3, 2), steps=4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network.sample(generators(3), torch.ones(3, 2), steps=4)
    assert torch.equal(plain, mixed)
