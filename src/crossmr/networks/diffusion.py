"""Gaussian diffusion in pure functions: a schedule, the forward process, and DDIM with x_0 prediction.

Tensors are (B, *dims), any number of dims; `alpha_bar` is the signal's fraction of the variance, in (0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossmr.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Noise schedule linear in √β, with the defaults of CDM, RCG and latent diffusion (Rombach et al. 2022).

    RCG calls it "linear"; diffusers calls it "scaled_linear", MONAI "scaled_linear_beta".
    """

    steps: int = 1000
    """Diffusion steps T; a step t runs from 0, nearly clean, to T - 1, nearly noise."""
    beta_start: float = 0.0015
    """Variance added by step 0, in (0, beta_end]."""
    beta_end: float = 0.0195
    """Variance added by step T - 1, in [beta_start, 1)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Schedule: steps is {self.steps}, must be 1 or more.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"Schedule: betas run from {self.beta_start} to {self.beta_end}; choose 0 < beta_start <= beta_end < 1."
            )

    def alpha_bar(self) -> Tensor:
        """(T,) float64 on the CPU, descending: prod over s <= t of 1 - beta_s (Ho et al. 2020, Eq. 4)."""
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64)
        return torch.cumprod(1 - roots**2, dim=0)


def q_sample(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Diffuse clean data to the step whose `alpha_bar` is given, (B,) or () (Ho et al. 2020, Eq. 4)."""
    return _broadcast(alpha_bar.sqrt(), x_0) * x_0 + _broadcast((1 - alpha_bar).sqrt(), x_0) * noise


def noise_from_x0(x_t: Tensor, x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that leads from x_0 to x_t: `q_sample` solved for it; `alpha_bar` (B,) or (), below 1."""
    return (x_t - _broadcast(alpha_bar.sqrt(), x_t) * x_0) / _broadcast((1 - alpha_bar).sqrt(), x_t)


def ddim_timesteps(steps_total: int, steps: int) -> list[int]:
    """`steps` descending time steps from the last one, total - 1, on: "trailing" spacing (Lin et al. 2024, Table 2).

    Sampling starts from pure noise, so it has to start where the schedule ends, however few the steps.
    """
    if not 1 <= steps <= steps_total:
        raise ConfigError(f"DDIM: {steps} sampling steps of a {steps_total}-step schedule; choose 1 to {steps_total}.")
    return [round(steps_total - i * steps_total / steps) - 1 for i in range(steps)]


def ddim_step(
    x_t: Tensor, x_0: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta: float, noise: Tensor
) -> Tensor:
    """One reverse step given the predicted x_0 (Song et al. 2021, Eq. 12, sigma of Eq. 16).

    Args:
        x_t: (B, *dims), the noisy data.
        x_0: (B, *dims), the network's prediction of the clean data.
        alpha_bar_t: (B,) or (), of the current step, below 1.
        alpha_bar_prev: (B,) or (), of the step arrived at; 1 for the final step, which returns x_0.
        eta: 0 deterministic DDIM, 1 as stochastic as DDPM.
        noise: (B, *dims), standard normal; unused at eta 0 and in the final step.
    """
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)).sqrt()
    direction = _broadcast((1 - alpha_bar_prev - sigma**2).sqrt(), x_t) * noise_from_x0(x_t, x_0, alpha_bar_t)
    return _broadcast(alpha_bar_prev.sqrt(), x_t) * x_0 + direction + _broadcast(sigma, x_t) * noise


@torch.no_grad()
def ddim_sample(
    predict_x0: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    schedule: Schedule,
    *,
    steps: int = 50,
    eta: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw samples by DDIM (Song et al. 2021, Section 4.1).

    Args:
        predict_x0: from x_t (B, *dims) float32 and t (B,) int64, both on `device`, to x_0 (B, *dims).
        shape: (B, *dims) of the result.
        schedule: the one the network was trained with.
        steps: sampling steps, 1 to schedule.steps.
        eta: 0 deterministic given the first noise, 1 as stochastic as DDPM; in [0, 1].
        generator: one for each row, or a single one for all. A row takes all of its noise in one go,
            so a batch equals its rows sampled one by one. A CPU generator gives the same noise on any device.
        device: where the sampling runs.

    Returns:
        (B, *dims) float32 on `device`.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"DDIM: eta is {eta}; choose 0 (deterministic) to 1 (as stochastic as DDPM).")
    rows, *dims = shape
    generators = [generator] * rows if isinstance(generator, torch.Generator) else generator
    if len(generators) != rows:
        raise ValueError(f"ddim_sample: {len(generators)} generators for {rows} rows; pass one per row, or one.")
    timesteps = ddim_timesteps(schedule.steps, steps)
    alpha_bar = schedule.alpha_bar()
    arrivals = [*alpha_bar[timesteps[1:]], alpha_bar.new_ones(())]
    draws = [torch.randn(steps, *dims, generator=g, device=g.device) for g in generators]
    x, *noises = torch.stack(draws, dim=1).to(device).unbind()  # steps times (B, *dims)
    for t, alpha_bar_prev, noise in zip(timesteps, arrivals, [*noises, torch.zeros_like(x)], strict=True):
        x_0 = predict_x0(x, torch.full((rows,), t, device=device))
        x = ddim_step(x, x_0, alpha_bar[t], alpha_bar_prev, eta, noise)
    return x


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or () to (B, 1, ...) or (1, 1, ...), of the other tensor's rank, dtype and device."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)
