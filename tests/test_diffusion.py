"""The schedule and DDIM, against MONAI, diffusers and closed forms."""

import warnings

import pytest
import torch

from crossmr.errors import ConfigError
from crossmr.networks.diffusion import Schedule, ddim_sample, ddim_step, ddim_timesteps, noise_from_x0, q_sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs, on import
    from diffusers import DDIMScheduler as DiffusersDDIM
    from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
    from monai.networks.schedulers import DDPMScheduler as MonaiDDPM

SCHEDULE = Schedule()
BETAS = {"beta_start": SCHEDULE.beta_start, "beta_end": SCHEDULE.beta_end}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def diffusers_ddim(steps):
    scheduler = DiffusersDDIM(
        1000,
        **BETAS,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=0,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def monai_ddim(steps):
    scheduler = MonaiDDIM(1000, "scaled_linear_beta", prediction_type="sample", clip_sample=False, **BETAS)
    scheduler.set_timesteps(steps)
    return scheduler


def bounded(x, t):
    """A predictor that depends on x, on t, and on nothing else in the batch."""
    return x.clamp(-1, 1) * 0.5 + t.view(-1, *[1] * (x.ndim - 1)) / 1000


def point_mass(value):
    return lambda x, t: torch.full_like(x, value)


def posterior_mean(mu, std):
    """E[x_0 | x_t] where the data are N(mu, std²): the exact denoiser."""
    alpha_bar = SCHEDULE.alpha_bar().float()

    def predict(x, t):
        a = alpha_bar[t].view(-1, 1)
        return mu + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (x - a.sqrt() * mu)

    return predict


def test_alpha_bar_is_monais_and_diffusers():
    ours = SCHEDULE.alpha_bar()
    assert ours.shape == (1000,)
    assert ours.dtype == torch.float64
    for theirs in (MonaiDDPM(1000, "scaled_linear_beta", **BETAS), monai_ddim(50), diffusers_ddim(50)):
        torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=2e-5, atol=0)


def test_the_schedule_is_linear_in_the_root_of_beta_and_not_in_beta():
    alpha_bar = SCHEDULE.alpha_bar()
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    torch.testing.assert_close(betas.sqrt().diff(), torch.full((999,), (0.0195**0.5 - 0.0015**0.5) / 999).double())
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([0.0015, 0.0195]).double())
    linear = DiffusersDDIM(1000, **BETAS, beta_schedule="linear").alphas_cumprod.double()
    steps = [99, 249, 499, 749, 999]
    theirs, ours = (values[steps] / (1 - values[steps]) for values in (linear, alpha_bar))  # signal to noise
    torch.testing.assert_close(theirs / ours, torch.tensor([0.78, 0.62, 0.40, 0.23, 0.18]).double(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("dims", [(192,), (2, 8, 8), (1, 4, 4, 4)])
def test_q_sample_is_monais_and_diffusers(dims):
    x_0, noise = torch.randn(2, 4, *dims, generator=seeded())
    t = torch.tensor([0, 1, 500, 999])
    ours = q_sample(x_0, noise, SCHEDULE.alpha_bar()[t])
    assert ours.dtype == torch.float32
    for theirs in (MonaiDDPM(1000, "scaled_linear_beta", **BETAS), diffusers_ddim(50)):
        torch.testing.assert_close(ours, theirs.add_noise(x_0, noise, timesteps=t), rtol=1e-5, atol=1e-5)


def test_q_sample_keeps_unit_variance_and_ends_near_noise():
    x_0, noise = torch.randn(2, 1, 100_000, generator=seeded())
    for t in (0, 300, 999):
        assert q_sample(x_0, noise, SCHEDULE.alpha_bar()[t]).var().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(q_sample(x_0, noise, SCHEDULE.alpha_bar()[999]), noise, rtol=0, atol=0.1)


def test_noise_is_recovered_from_x_t_and_x_0():
    x_0, noise = torch.randn(2, 5, 7, generator=seeded(), dtype=torch.float64)
    alpha_bar = SCHEDULE.alpha_bar()[[0, 10, 100, 500, 999]]
    torch.testing.assert_close(noise_from_x0(q_sample(x_0, noise, alpha_bar), x_0, alpha_bar), noise)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 333, 500, 1000])
def test_timesteps_are_diffusers_trailing(steps):
    ours = ddim_timesteps(1000, steps)
    assert ours == diffusers_ddim(steps).timesteps.tolist()
    assert len(set(ours)) == steps


def test_timesteps_are_monais_over_the_whole_schedule():
    assert ddim_timesteps(1000, 1000) == monai_ddim(1000).timesteps.tolist()  # it spaces fewer steps otherwise


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50, 333])
def test_every_ddim_step_is_monais_and_diffusers(steps, eta):
    theirs, monai, alpha_bar = diffusers_ddim(steps), monai_ddim(steps), SCHEDULE.alpha_bar()
    x = torch.randn(2, 16, generator=seeded(1))
    for t in ddim_timesteps(1000, steps):
        noise = torch.randn(2, 16, generator=seeded(t))  # MONAI draws the same from the same generator
        x_0, before = bounded(x, torch.full((2,), t)), t - 1000 // steps
        prev = alpha_bar[before] if before >= 0 else torch.tensor(1.0, dtype=torch.float64)
        ours = ddim_step(x, x_0, alpha_bar[t], prev, eta, noise)
        given = theirs.step(x_0, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        torch.testing.assert_close(ours, given, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, monai.step(x_0, t, x, eta, seeded(t))[0], rtol=1e-5, atol=1e-5)
        x = ours


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_the_whole_sampler_is_diffusers(steps, eta):
    ours = ddim_sample(bounded, (1, 16), SCHEDULE, steps=steps, eta=eta, generator=seeded())
    x, *noises = torch.randn(steps, 1, 16, generator=seeded())
    theirs = diffusers_ddim(steps)
    for t, noise in zip(theirs.timesteps.tolist(), [*noises, torch.zeros(1, 16)], strict=True):
        x_0 = bounded(x, torch.full((1,), t))
        x = theirs.step(x_0, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_ddim_step_takes_a_step_of_its_own_for_each_row():
    x, x_0, noise = torch.randn(3, 2, 5, generator=seeded())
    now, before = SCHEDULE.alpha_bar()[[100, 900]], SCHEDULE.alpha_bar()[[80, 500]]
    rows = [ddim_step(x[[i]], x_0[[i]], now[[i]], before[[i]], 1.0, noise[[i]]) for i in range(2)]
    torch.testing.assert_close(ddim_step(x, x_0, now, before, 1.0, noise), torch.cat(rows))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 50, 1000])
def test_an_exact_denoiser_of_a_point_recovers_it(steps, eta):
    sample = ddim_sample(point_mass(0.7), (3, 2, 4), SCHEDULE, steps=steps, eta=eta, generator=seeded())
    torch.testing.assert_close(sample, torch.full((3, 2, 4), 0.7))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_exact_denoiser_of_a_gaussian_samples_it(eta):
    predict = posterior_mean(mu=3.0, std=0.5)
    sample = ddim_sample(predict, (1, 10_000), SCHEDULE, steps=500, eta=eta, generator=seeded())
    assert sample.mean().item() == pytest.approx(3.0, abs=0.03)
    assert sample.std().item() == pytest.approx(0.5, abs=0.01)


def test_the_predictor_sees_every_time_step_in_order():
    seen = []

    def predict(x, t):
        assert (x.shape, t.shape, t.dtype) == ((2, 3), (2,), torch.int64)
        seen.append(t.unique().item())
        return x

    ddim_sample(predict, (2, 3), SCHEDULE, steps=20, generator=seeded())
    assert seen == ddim_timesteps(1000, 20)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_batch_equals_its_rows_one_by_one(eta):
    def sample(rows, generator):
        return ddim_sample(bounded, (rows, 3, 5), SCHEDULE, steps=10, eta=eta, generator=generator)

    one = seeded(7)
    assert torch.equal(sample(4, seeded(7)), torch.cat([sample(1, one) for _ in range(4)]))
    own = sample(4, [seeded(seed) for seed in range(4)])
    assert torch.equal(own, torch.cat([sample(1, seeded(seed)) for seed in range(4)]))
    assert torch.equal(own.flip(0), sample(4, [seeded(seed) for seed in (3, 2, 1, 0)]))


def test_sampling_is_a_function_of_its_seed():
    first, again, other = (
        ddim_sample(bounded, (2, 8), SCHEDULE, steps=10, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_eta_0_is_decided_by_the_first_noise():
    def sample(eta):
        return ddim_sample(bounded, (1, 8), SCHEDULE, steps=2, eta=eta, generator=seeded())

    start = torch.randn(2, 1, 8, generator=seeded())[0]
    alpha_bar = SCHEDULE.alpha_bar()
    x = ddim_step(start, bounded(start, torch.tensor([999])), alpha_bar[999], alpha_bar[499], 0.0, torch.ones(1, 8))
    torch.testing.assert_close(sample(0.0), bounded(x, torch.tensor([499])))
    assert not torch.allclose(sample(0.0), sample(1.0))
    by_default = ddim_sample(bounded, (1, 8), SCHEDULE, steps=2, generator=seeded())
    assert torch.equal(by_default, sample(1.0))


def test_sampling_builds_no_graph():
    weight = torch.ones((), requires_grad=True)
    sample = ddim_sample(lambda x, t: weight * x, (1, 4), SCHEDULE, steps=3, generator=seeded())
    assert not sample.requires_grad


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"beta_start": 0.0}, {"beta_start": 0.02}, {"beta_end": 1.0}, {"beta_end": float("nan")}],
)
def test_a_senseless_schedule_is_refused(bad):
    with pytest.raises(ConfigError, match="Schedule"):
        Schedule(**bad)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_senseless_sampling_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="choose 1 to 1000"):
        ddim_sample(bounded, (1, 2), SCHEDULE, steps=steps, generator=seeded())


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_a_senseless_eta_is_refused(eta):
    with pytest.raises(ConfigError, match="eta"):
        ddim_sample(bounded, (1, 2), SCHEDULE, eta=eta, generator=seeded())


def test_generators_must_be_one_a_row():
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        ddim_sample(bounded, (2, 2), SCHEDULE, generator=[seeded()])
