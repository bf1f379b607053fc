"""Stage 2, MDN: a diffusion model over the representation, small enough to cost nothing.

A residual MLP predicts y_0 from its noised form y_t (Xing et al. 2024; blocks as in RCG, Li et al. 2023). It
may be told the source modalities' representation; that condition is dropped at random in training, so that
one network samples p(y_0) as published and p(y_0 | sources) as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossmr.diffusion import Schedule, ddim_sample, q_sample
from crossmr.errors import ConfigError
from crossmr.layers import zeroed


@dataclass(frozen=True)
class DistributionConfig:
    """The diffusion network's form."""

    width: int = 1536
    """Features of every block."""
    blocks: int = 12
    """Residual blocks."""
    conditional: bool = True
    """Whether the network can be told the sources' representation."""
    condition_dropout: float = 0.2
    """Share of training samples whose condition is withheld, which teaches the unconditional distribution."""
    schedule: Schedule = field(default_factory=Schedule)
    """The forward process."""

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(f"condition_dropout is {self.condition_dropout}; wanted a share from 0 to 1.")
        if self.width < 2 or self.width % 2 or self.blocks < 1:
            raise ConfigError(
                f"width is {self.width}, blocks {self.blocks}; wanted an even width and at least 1 block."
            )


def step_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) of diffusion steps t (B,) (Vaswani et al. 2017)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MLPBlock(nn.Module):
    """LayerNorm, SiLU, Linear, plus the projected embedding of step and condition [C]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.embedding = nn.Linear(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, width) to (B, width)."""
        return cast(Tensor, x + self.linear(F.silu(self.norm(x))) + self.embedding(F.silu(embedding)))


class DistributionNetwork(nn.Module):
    """Predicts the clean representation ŷ_0(y_t, t, condition)."""

    def __init__(self, config: DistributionConfig, dim: int, condition_dim: int):
        super().__init__()
        width = config.width
        self.config, self.dim = config, dim
        self.embed_step = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_condition = nn.Linear(condition_dim, width) if config.conditional else None
        self.no_condition = nn.Parameter(torch.zeros(width)) if config.conditional else None
        self.inwards = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.outwards = zeroed(nn.Linear(width, dim))
        self.register_buffer("alpha_bar", config.schedule.alpha_bar().float(), persistent=False)

    def forward(self, y_t: Tensor, t: Tensor, condition: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Predict y_0 (B, D) from y_t (B, D) at steps t (B,).

        condition (B, C) is the sources' representation; keep (B, 1) of zeros and ones withholds it where 0.
        """
        embedding = self.embed_step(step_embedding(t, self.config.width))  # (B, width)
        if self.embed_condition is not None:
            told = self.no_condition.expand_as(embedding)  # type: ignore[union-attr]
            if condition is not None:
                known = self.embed_condition(condition)
                told = known if keep is None else torch.where(keep > 0, known, told)
            embedding = embedding + told
        x = self.inwards(y_t)  # (B, width)
        for block in self.blocks:
            x = block(x, embedding)
        return cast(Tensor, self.outwards(F.silu(self.norm(x))))  # (B, D)

    def loss(self, y_0: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """‖y_0 − ŷ_0(y_t, t)‖², averaged over a batch (B, D); steps and noise are drawn from `generator`."""
        batch = y_0.shape[0]
        t = torch.randint(self.config.schedule.steps, (batch,), generator=generator)
        noise = torch.randn(y_0.shape, generator=generator)
        keep = (torch.rand(batch, 1, generator=generator) >= self.config.condition_dropout).float()
        t, noise, keep = t.to(y_0.device), noise.to(y_0.device), keep.to(y_0.device)
        y_t = q_sample(y_0, noise, self.alpha_bar[t])  # type: ignore[index]
        return F.mse_loss(cast(Tensor, self(y_t, t, condition, keep)).float(), y_0)

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        condition: Tensor | None = None,
        *,
        steps: int = 50,
        eta: float = 1.0,
    ) -> Tensor:
        """Draw one representation a generator, (B, D), by DDIM; `condition` (B, C), or None for p(y_0)."""

        def predict(y_t: Tensor, t: Tensor) -> Tensor:
            return cast(Tensor, self(y_t, t, condition)).float()

        return ddim_sample(
            predict,
            (len(generators), self.dim),
            self.config.schedule,
            steps=steps,
            eta=eta,
            generator=generators,
            device=next(self.parameters()).device,
        )
