"""Stage 2: the MDN is RCG's network, and learns a distribution of two clusters and which of them a condition means."""

import warnings
from dataclasses import replace

import pytest
import torch
from fake_cuda import fake_cuda
from torch.nn import functional as F

from crossmr.errors import ConfigError
from crossmr.networks.diffusion import Schedule, q_sample
from crossmr.networks.distribution import DistributionConfig, DistributionNetwork, MLPBlock, step_embedding

CENTRES = torch.tensor([[2.0, 1.0, -1.0], [-2.0, -1.0, 1.0]])
SPREAD = 0.4
CONFIG = DistributionConfig(width=32, blocks=2, conditional=True)
ALPHA_BAR = CONFIG.schedule.alpha_bar().float()


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


def random_network(config=CONFIG, dim=3, condition_dim=2, seed=0):
    torch.manual_seed(seed)
    network = DistributionNetwork(config, dim, condition_dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.requires_grad_(False)


def test_a_network_is_made_of_a_few_numbers():
    network = DistributionNetwork(replace(CONFIG, conditional=False), dim=5)
    assert network(torch.zeros(2, 5), torch.tensor([0, 999])).shape == (2, 5)
    assert network.sample([seeded()], steps=2).shape == (1, 5)
    for wrong in ({"dim": 0}, {"config": replace(CONFIG, conditional=True)}, {"condition_dim": -1}):
        with pytest.raises(ConfigError, match="expected at least 1 feature"):
            DistributionNetwork(**{"config": replace(CONFIG, conditional=False), **wrong})


def squared_error(network, y_0, condition=None, features=None, generator=None, dropout=0.0):
    """Sum and count over steps, noise and withheld conditions that are drawn from the generator."""
    generator = generator or seeded(2)
    t = torch.randint(network.config.schedule.steps, (len(y_0),), generator=generator)
    noise = torch.randn(y_0.shape, generator=generator)
    keep = (torch.rand(len(y_0), 1, generator=generator) >= dropout).float()
    features = torch.ones_like(y_0) if features is None else features
    return network.squared_error(y_0, features, t, noise, condition, keep)


def exact_denoiser(y_t, alpha_bar):
    """E[y_0 | y_t] of the two clusters together: no network without the condition can do better."""
    a = alpha_bar[:, None]
    variance = a * SPREAD**2 + 1 - a
    away = y_t[:, None] - a.sqrt()[..., None] * CENTRES  # (B, 2, D)
    weight = torch.softmax(-(away**2).sum(-1) / (2 * variance), dim=1)
    posterior = CENTRES + (a.sqrt() * SPREAD**2 / variance)[..., None] * away
    return (weight[..., None] * posterior).sum(1)


# RCG's network


def silu(x):
    return x / (1 + torch.exp(-x))


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    return (
        weights[f"{name}.weight"] * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        + (weights[f"{name}.bias"])
    )


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rcg(network, y_t, t, condition=None):
    """RCG's network, written from its formula."""
    weights, width = network.state_dict(), network.config.width
    angles = torch.tensor([[float(s) / 10_000 ** (2 * k / width) for k in range(width // 2)] for s in t])
    embedding = linear(torch.cat([angles.cos(), angles.sin()], 1), weights, "step_mlp.0")
    embedding = linear(silu(embedding), weights, "step_mlp.2")
    x = linear(y_t, weights, "input_projection")
    for number in range(network.config.blocks):
        name = f"blocks.{number}"
        h = linear(silu(layer_norm(x, weights, f"{name}.norm_1")), weights, f"{name}.linear_1")
        h = h + linear(silu(embedding), weights, f"{name}.step")
        if condition is not None:
            h = h + linear(silu(condition), weights, f"{name}.condition")
        x = x + linear(silu(layer_norm(h, weights, f"{name}.norm_2")), weights, f"{name}.linear_2")
    return linear(silu(layer_norm(x, weights, "norm")), weights, "output_projection")


@pytest.mark.parametrize("conditional", [True, False])
def test_the_network_is_rcgs(conditional):
    network = random_network(DistributionConfig(width=16, blocks=3, conditional=conditional), 5, 4)
    y_t, t = torch.randn(6, 5, generator=seeded()), torch.tensor([0, 1, 10, 500, 998, 999])
    condition = torch.randn(6, 4, generator=seeded(1)) if conditional else None
    torch.testing.assert_close(network(y_t, t, condition), rcg(network, y_t, t, condition), atol=1e-5, rtol=1e-5)
    if conditional:
        withheld = network.no_condition.expand(6, 4)
        torch.testing.assert_close(network(y_t, t), rcg(network, y_t, t, withheld), atol=1e-5, rtol=1e-5)


def test_a_block_is_rcgs_to_the_last_digit():
    network = random_network(DistributionConfig(width=16, blocks=1, conditional=True), 5, 4)
    block, weights = network.blocks[0], network.blocks[0].state_dict()
    x, t, condition = torch.randn(3, 16, generator=seeded()), torch.tensor([0, 300, 999]), torch.randn(3, 4)
    embedding = network.step_mlp(step_embedding(t, 16))
    (given,) = network.block_embeddings(t, condition)
    h = linear(silu(layer_norm(x, weights, "norm_1")), weights, "linear_1")
    h = h + linear(silu(embedding), weights, "step") + linear(silu(condition), weights, "condition")
    want = x + linear(silu(layer_norm(h, weights, "norm_2")), weights, "linear_2")
    torch.testing.assert_close(block(x, given), want, atol=1e-6, rtol=1e-6)


def test_a_block_is_diffusers_residual_block_of_one_pixel():
    """One group of all channels is a layer norm; of a 3 × 3 kernel over one pixel the centre alone counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from diffusers.models.resnet import ResnetBlock2D
    network = random_network(DistributionConfig(width=16, blocks=1, conditional=True), 5, 4)
    weights = network.blocks[0].state_dict()
    theirs = ResnetBlock2D(in_channels=16, temb_channels=16 + 4, groups=1, eps=1e-5)
    state = {}
    for kind in ("weight", "bias"):
        for number in (1, 2):
            state[f"norm{number}.{kind}"] = weights[f"norm_{number}.{kind}"]
        for number in (1, 2):
            matrix = weights[f"linear_{number}.{kind}"]
            state[f"conv{number}.{kind}"] = matrix if kind == "bias" else F.pad(matrix[..., None, None], [1] * 4)
    state["time_emb_proj.weight"] = torch.cat([weights["step.weight"], weights["condition.weight"]], 1)
    state["time_emb_proj.bias"] = weights["step.bias"] + weights["condition.bias"]
    theirs.load_state_dict(state)
    x, t, condition = torch.randn(3, 16, generator=seeded()), torch.tensor([0, 300, 999]), torch.randn(3, 4)
    given = torch.cat([network.step_mlp(step_embedding(t, 16)), condition], 1)
    with torch.no_grad():
        want = theirs(x[..., None, None], given)[..., 0, 0]
    (embedding,) = network.block_embeddings(t, condition)
    torch.testing.assert_close(network.blocks[0](x, embedding), want, atol=1e-5, rtol=1e-5)


def test_steps_are_embedded_as_in_diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from diffusers.models.embeddings import get_timestep_embedding
    theirs = get_timestep_embedding(torch.arange(1000), 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(step_embedding(torch.arange(1000), 64), theirs, atol=2e-4, rtol=0)


def test_every_block_starts_as_the_identity_and_the_network_by_predicting_zero():
    torch.manual_seed(0)
    network, y_t = DistributionNetwork(CONFIG, 3, 2), torch.randn(5, 3)
    t, condition = torch.tensor([0, 1, 300, 700, 999]), torch.randn(5, 2)
    x = network.input_projection(y_t)
    for block, embedding in zip(network.blocks, network.block_embeddings(t, condition), strict=True):
        assert embedding.abs().max() > 0.01
        assert torch.equal(block(x, embedding), x)
    assert not network(y_t, t, condition).any()
    zero = {name for name, parameter in network.named_parameters() if not parameter.any()}
    zero = {name for name in zero if not name.endswith("norm.bias") and ".norm_" not in name}
    assert zero == {f"blocks.{k}.linear_2.{kind}" for k in (0, 1) for kind in ("weight", "bias")} | {
        "output_projection.weight",
        "output_projection.bias",
        "no_condition",
    }


def test_the_size_is_the_papers():
    with torch.device("meta"):
        network = DistributionNetwork(DistributionConfig(), 192, 192)
    assert len(network.blocks) == 12
    assert all(isinstance(block, MLPBlock) and block.condition is None for block in network.blocks)
    for name in ("linear_1", "linear_2", "step"):
        assert all(getattr(block, name).weight.shape == (1536, 1536) for block in network.blocks)
    assert set(dict(network.named_buffers())) == {"centre", "scale"}  # the schedule is no weight


def test_steps_are_embedded_apart():
    embedded = step_embedding(torch.arange(1000), 64)
    assert embedded.shape == (1000, 64)
    torch.testing.assert_close(embedded[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    distance = torch.cdist(embedded, embedded) + 10 * torch.eye(1000)
    assert distance.min() > 0.1


def test_the_step_and_every_parameter_matter():
    network = random_network().requires_grad_()
    y_t = torch.randn(1, 3, generator=seeded()).expand(3, -1)
    predicted = network(y_t, torch.tensor([0, 400, 999]))
    assert torch.cdist(predicted, predicted)[0, 1:].min() > 1e-3
    squared_error(network, *clusters(64, seeded()), dropout=0.3)[0].backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("wrong", [{"width": 7}, {"width": 0}, {"blocks": 0}, {"condition_dropout": 1.5}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DistributionConfig(**wrong)


# The condition


def test_keep_withholds_the_condition():
    network, t = random_network(), torch.tensor([1, 500, 999])
    y_t, condition = torch.randn(3, 3, generator=seeded()), torch.eye(2)[[0, 1, 0]]
    none, given = network(y_t, t), network(y_t, t, condition)
    assert (none - given).abs().amax(1).min() > 1e-3
    mixed = network(y_t, t, condition, torch.tensor([[0.0], [1.0], [0.0]]))
    torch.testing.assert_close(mixed, torch.stack([none[0], given[1], none[2]]))
    withheld = network(y_t, t, condition, torch.zeros(3, 1))
    assert torch.equal(withheld, network(y_t, t, condition + 5, torch.zeros(3, 1)))
    assert torch.equal(network(y_t, t, condition, torch.ones(3, 1)), given)


@pytest.mark.parametrize(("dropout", "used"), [(0.0, True), (1.0, False)])
def test_a_condition_that_is_withheld_teaches_the_unconditional_distribution(dropout, used):
    network = random_network(DistributionConfig(width=16, blocks=1, conditional=True)).requires_grad_()
    y_0, condition = clusters(16, seeded(3))
    condition.requires_grad_()
    squared_error(network, y_0, condition, dropout=dropout)[0].backward()
    assert bool(condition.grad.abs().max() > 0) == used
    assert (network.no_condition.grad is not None and bool(network.no_condition.grad.abs().max() > 0)) != used


def test_an_unconditional_network_has_no_condition():
    network = random_network(DistributionConfig(width=16, blocks=1))
    assert not [name for name, _ in network.named_parameters() if "condition" in name]
    y_0, condition = clusters(4, seeded())
    assert squared_error(network, y_0) == squared_error(network, y_0, condition)
    assert network.sample(generators(2), steps=3).shape == (2, 3)


# The loss


def test_the_loss_is_the_squared_error_of_the_prediction_of_y_0():
    network, (y_0, condition) = random_network(), clusters(5, seeded())
    network.fit_standardisation(*[torch.randn(50, 3, generator=seeded(9)) * 2 + 1, torch.ones(50, 3)])
    t, noise = torch.tensor([0, 10, 300, 700, 999]), torch.randn(5, 3, generator=seeded(1))
    features = torch.tensor([[1.0, 1, 0]] * 2 + [[1.0, 1, 1]] * 3)
    total, count = network.squared_error(y_0, features, t, noise, condition)
    assert count == 13
    clean = features * (y_0 - network.centre) / network.scale
    alpha_bar = ALPHA_BAR[t][:, None]
    y_t = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(total, ((network(y_t, t, condition) - clean) ** 2)[features > 0].sum())


@pytest.mark.parametrize("parts", [(3, 3), (5, 1), (6, 0)])
def test_a_batchs_loss_is_the_sum_of_its_parts(parts):
    network, (y_0, condition) = random_network(), clusters(6, seeded())
    batch = (
        y_0,
        torch.tensor([[1.0, 1, 0]] * 2 + [[0.0, 0, 0]] + [[1.0, 1, 1]] * 3),
        torch.tensor([0, 10, 300, 700, 999, 5]),
        torch.randn(6, 3, generator=seeded(1)),
        condition,
        torch.tensor([[1.0], [0], [1], [1], [0], [1]]),
    )
    whole = torch.stack(network.squared_error(*batch))
    each = [
        torch.stack(network.squared_error(*part)) for part in zip(*(value.split(parts) for value in batch), strict=True)
    ]
    torch.testing.assert_close(sum(each), whole, atol=1e-6, rtol=1e-6)


def test_a_network_that_learnt_nothing_errs_by_all_of_the_variance_and_draws_the_mean():
    torch.manual_seed(0)
    network, y_0 = DistributionNetwork(CONFIG, 3, 2), 4 + 2 * torch.randn(50, 3, generator=seeded())
    network.fit_standardisation(y_0, torch.ones_like(y_0))
    total, count = squared_error(network, y_0)
    assert float(total.detach() / count) == pytest.approx(1, abs=1e-4)
    mean = y_0.mean(0)
    torch.testing.assert_close(network.sample(generators(5), steps=3), mean.expand(5, 3))
    torch.testing.assert_close(network.state_dict()["centre"], mean)  # it comes back with the weights
    torch.testing.assert_close(network.state_dict()["scale"], y_0.std(0, unbiased=False))


def test_standardised_the_unit_of_a_feature_does_not_matter():
    network = random_network()
    y_0, condition = torch.randn(64, 3, generator=seeded()), torch.randn(64, 2, generator=seeded(1))
    gain, shift = torch.tensor([0.01, 3.0, 40.0]), torch.tensor([5.0, -2.0, 0.3])

    def measured(vectors):
        network.fit_standardisation(vectors, torch.ones_like(vectors))
        return float(squared_error(network, vectors, condition)[0]), network.sample(
            generators(2), condition[:2], steps=4
        )

    (loss, drawn), (again, mapped) = measured(y_0), measured(gain * y_0 + shift)
    assert again == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(mapped, gain * drawn + shift, atol=1e-3, rtol=1e-3)
    network.fit_standardisation(torch.zeros_like(y_0), torch.ones_like(y_0))
    assert squared_error(network, y_0, condition)[0].isfinite()


def test_what_is_no_target_brings_no_loss_and_comes_out_as_zero():
    network = random_network(dim=4)
    y_0, condition = torch.randn(6, 4, generator=seeded()), torch.randn(6, 2, generator=seeded(1))
    features = torch.tensor([[1.0, 1, 0, 1]] * 3 + [[0.0, 1, 1, 1]] * 3)
    network.fit_standardisation(y_0, features)
    changed = y_0.clone()
    changed[:3, 2], changed[3:, 0] = 50, -50
    assert squared_error(network, changed, condition, features) == squared_error(network, y_0, condition, features)
    assert squared_error(network, changed, condition)[0] > squared_error(network, y_0, condition)[0] + 1
    drawn = network.sample(generators(6), condition, features, steps=3)
    assert torch.equal(drawn == 0, features == 0)


# Standardisation


def test_a_feature_is_standardised_over_the_samples_that_have_it():
    network, y_0 = random_network(dim=4), torch.randn(6, 4, generator=seeded())
    features = torch.tensor([[1.0, 1, 0, 0]] * 3 + [[0.0, 1, 1, 0]] * 3)
    network.centre[3], network.scale[3] = 7, 5
    network.fit_standardisation(torch.where(features > 0, y_0, torch.full_like(y_0, 99)), features)
    for column, rows in ((0, slice(0, 3)), (1, slice(0, 6)), (2, slice(3, 6))):
        torch.testing.assert_close(network.centre[column], y_0[rows, column].mean())
        torch.testing.assert_close(network.scale[column], y_0[rows, column].std(unbiased=False))
    assert (network.centre[3], network.scale[3]) == (7, 5)  # no sample has it


def test_vectors_on_the_processor_standardise_a_network_on_a_gpu():
    y_0 = torch.randn(6, 4, generator=seeded())
    features = torch.tensor([[1.0, 1, 0, 0]] * 3 + [[0.0, 1, 1, 0]] * 3)
    want = random_network(dim=4)
    want.fit_standardisation(y_0, features)
    with fake_cuda():
        for place in ("cpu", "cuda"):
            network = random_network(dim=4).to("cuda")
            network.fit_standardisation(y_0.to(place), features.to(place))
            assert network.centre.is_cuda
            assert network.scale.is_cuda
            assert torch.equal(network.centre.cpu(), want.centre)
            assert torch.equal(network.scale.cpu(), want.scale)


def test_a_gpu_draws_what_the_processor_draws():
    network, condition = random_network(), torch.eye(2)
    want = network.sample(generators(2), condition, torch.tensor([[1.0, 1, 0]] * 2), steps=3)
    y_0, features = clusters(4, seeded())[0], torch.ones(4, 3)
    t, noise = torch.tensor([0, 10, 500, 999]), torch.randn(4, 3, generator=seeded())
    loss = network.squared_error(y_0, features, t, noise)
    with fake_cuda():
        network.to("cuda")
        drawn = network.sample(generators(2), condition.cuda(), torch.tensor([[1.0, 1, 0]] * 2).cuda(), steps=3)
        total, count = network.squared_error(*(x.to("cuda") for x in (y_0, features, t, noise)))
        assert drawn.is_cuda
        assert total.is_cuda
        torch.testing.assert_close(drawn.cpu(), want)
        torch.testing.assert_close((total.cpu(), count.cpu()), loss)


# Samples


def test_a_row_depends_on_its_generator_and_condition_alone():
    network, condition = random_network(), torch.randn(4, 2, generator=seeded())
    batch = network.sample(generators(4), condition, steps=5)
    single = [network.sample([seeded(k)], condition[k : k + 1], steps=5) for k in range(4)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=1e-5)
    assert torch.equal(batch, network.sample(generators(4), condition, steps=5))
    for other in (
        network.sample(generators(4, start=10), condition, steps=5),
        network.sample(generators(4), condition.flip(0), steps=5),
        network.sample(generators(4), None, steps=5),
    ):
        assert (batch - other).abs().amax(1).min() > 1e-4


def test_samples_are_diffusers_ddim_of_eta_1():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from diffusers import DDIMScheduler
    network, condition = random_network(), torch.randn(1, 2, generator=seeded())
    network.fit_standardisation(4 + 2 * torch.randn(50, 3, generator=seeded(1)), torch.ones(50, 3))
    form = {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(1000, 0.0015, 0.0195, "scaled_linear", **form)
    theirs.set_timesteps(10)
    x, *noises = torch.randn(10, 1, 3, generator=seeded(5))
    for t, noise in zip(theirs.timesteps, [*noises, torch.zeros(1, 3)], strict=True):
        x_0 = network(x, t[None], condition)
        x = theirs.step(x_0, int(t), x, eta=1.0, variance_noise=noise, return_dict=False)[0]
    want = x * network.scale + network.centre
    torch.testing.assert_close(network.sample([seeded(5)], condition, steps=10), want, atol=1e-4, rtol=1e-4)


def test_each_step_of_the_sampler_is_given_its_own_embedding():
    network, condition = random_network(), torch.randn(2, 2, generator=seeded())
    seen = []
    denoise = network.denoise
    network.denoise = lambda y_t, embeddings: seen.append(embeddings) or denoise(y_t, embeddings)
    network.sample(generators(2), condition, steps=4)
    assert len(seen) == 4
    for embeddings, step in zip(seen, (999, 749, 499, 249), strict=True):
        alone = network.block_embeddings(torch.full((2,), step), condition)
        for one, other in zip(embeddings, alone, strict=True):
            torch.testing.assert_close(one, other)


def test_sampling_builds_no_graph():
    assert not random_network().requires_grad_().sample(generators(1), None, steps=2).requires_grad


def test_a_vector_is_drawn_in_full_precision_within_mixed():
    network = random_network()
    plain = network.sample(generators(3), torch.ones(3, 2), steps=4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network.sample(generators(3), torch.ones(3, 2), steps=4)
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize("steps", [0, 1001])
def test_senseless_sampling_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="choose 1 to 1000"):
        random_network().sample(generators(1), steps=steps)


# Learning


@pytest.fixture(scope="module")
def trained():
    """A network, and the mean losses of 400 steps."""
    torch.manual_seed(0)
    network, generator, losses = DistributionNetwork(CONFIG, 3, 2), seeded(), []
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.02, total_iters=400)
    for _ in range(400):
        y_0, condition = clusters(128, generator)
        total, count = squared_error(network, y_0, condition, generator=generator, dropout=0.3)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
        decay.step()
        losses.append(float((total / count).detach()))
    return network, losses


def test_the_loss_falls(trained):
    _, losses = trained
    assert losses[0] == pytest.approx(2 + SPREAD**2, rel=0.2)  # it starts by predicting zero
    assert sum(losses[-50:]) / 50 < 0.3 * losses[0]


def test_the_prediction_comes_near_the_exact_denoisers(trained):
    network, _ = trained
    y_0, condition = clusters(4000, seeded(5))
    t = torch.randint(1000, (4000,), generator=seeded(6))
    y_t = q_sample(y_0, torch.randn(y_0.shape, generator=seeded(7)), ALPHA_BAR[t])
    with torch.no_grad():
        blind, given = ((network(y_t, t, c) - y_0).square().mean() for c in (None, condition))
    best = (exact_denoiser(y_t, ALPHA_BAR[t]) - y_0).square().mean()
    assert best - 0.01 < blind < 1.1 * best
    assert given < 0.3 * best


def test_conditional_samples_follow_the_condition(trained):
    network, _ = trained
    which = torch.arange(64) % 2
    points = network.sample(generators(64), torch.eye(2)[which], steps=20)  # (64, 3)
    assert (nearest(points) == which).float().mean() > 0.98
    for k in (0, 1):
        torch.testing.assert_close(points[which == k].mean(0), CENTRES[k], atol=0.15, rtol=0)
        assert points[which == k].unique(dim=0).shape == (32, 3)
        assert points[which == k].std(0).max() < 1.5 * SPREAD


def test_unconditional_samples_of_the_same_network_cover_both_clusters(trained):
    network, _ = trained
    points = network.sample(generators(128), None, steps=50)
    assert 0.35 < nearest(points).float().mean() < 0.65
    distance = torch.cdist(points, CENTRES).amin(1)
    assert distance.quantile(0.9) < 2 * SPREAD  # against 4.9 between the centres


def test_a_schedule_of_other_betas_is_learnt_and_sampled_with_its_own():
    network = random_network(DistributionConfig(width=16, blocks=1, schedule=Schedule(steps=10, beta_end=0.9)))
    y_0, noise, t = torch.ones(1, 3), torch.zeros(1, 3), torch.tensor([9])
    total, _ = network.squared_error(y_0, torch.ones(1, 3), t, noise)
    y_t = network.config.schedule.alpha_bar()[9].sqrt().float() * y_0
    torch.testing.assert_close(total, (network(y_t, t) - 1).square().sum())
    with pytest.raises(ConfigError, match="choose 1 to 10"):
        network.sample(generators(1), steps=11)
