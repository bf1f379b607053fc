"""Stage 2, MDN: a diffusion model over the representation, small enough to cost nothing.

The residual MLP of RCG (Li, Katabi, He 2023) predicts y_0 from its noised form y_t (Xing et al. 2024). A conditional
one is also given the representations of the source modalities; that condition is dropped at random in training, so
that one network samples p(y_0), as published, and p(y_0 | sources).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossmr.device import autocast
from crossmr.errors import ConfigError
from crossmr.networks.diffusion import Schedule, ddim_sample, ddim_timesteps, q_sample
from crossmr.networks.unet import zero_init


@dataclass(frozen=True)
class DistributionConfig:
    """The diffusion network's form."""

    width: int = 1536
    """Features of every block [C]."""
    blocks: int = 12
    """Residual blocks [C]."""
    conditional: bool = False
    """Whether the network is given the sources' representations; without, y_0 is drawn as published."""
    condition_dropout: float = 0.2
    """Fraction of training samples whose condition is withheld, which teaches the unconditional distribution."""
    schedule: Schedule = field(default_factory=Schedule)
    """The forward process."""

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise ConfigError(f"condition_dropout is {self.condition_dropout}; expected a fraction from 0 to 1.")
        if self.width < 2 or self.width % 2 or self.blocks < 1:
            raise ConfigError(
                f"width is {self.width}, blocks {self.blocks}; expected an even width and at least 1 block."
            )


def step_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) of diffusion steps t (B,) (Vaswani et al. 2017)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MLPBlock(nn.Module):
    """RCG's block: x + W₂·SiLU(LN(W₁·SiLU(LN(x)) + W_t·SiLU(embedding of t) [+ W_c·SiLU(condition)])).

    W₂ is zero at first. The two embeddings are added up by `DistributionNetwork.block_embeddings`.
    """

    def __init__(self, width: int, condition_dim: int | None):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = zero_init(nn.Linear(width, width))
        self.step = nn.Linear(width, width)
        self.condition = None if condition_dim is None else nn.Linear(condition_dim, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, width) to (B, width), given the block's embedding (B, width) of step and condition."""
        h = self.linear_1(F.silu(self.norm_1(x))) + embedding
        return cast(Tensor, x + self.linear_2(F.silu(self.norm_2(h))))


class DistributionNetwork(nn.Module):
    """Predicts the clean representation ŷ_0(y_t, t, condition), a vector of `dim` features.

    `DistributionNetwork(DistributionConfig(width=256, blocks=4), dim=192)` learns p(y_0); with
    `DistributionConfig(conditional=True)` and `condition_dim=C` also p(y_0 | condition of C features).
    `squared_error` and `sample` are of vectors as they are, `forward` of standardised ones.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, config: DistributionConfig = DistributionConfig(), dim: int = 192, condition_dim: int = 0):
        super().__init__()
        if dim < 1 or condition_dim < (1 if config.conditional else 0):
            raise ConfigError(
                f"dim is {dim}, condition_dim {condition_dim}; expected at least 1 feature, and for the condition "
                "too if the network is conditional."
            )
        width = config.width
        self.config, self.dim = config, dim
        self.step_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.no_condition = nn.Parameter(torch.zeros(condition_dim)) if config.conditional else None
        self.input_projection = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            MLPBlock(width, condition_dim if config.conditional else None) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.output_projection = zero_init(nn.Linear(width, dim))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def fit_standardisation(self, y_0: Tensor, target_features: Tensor) -> None:
        """Take each feature's mean and standard deviation over training vectors (N, D), so that unit variance diffuses.

        Z-scored vectors share most of their direction, and noise would hide what differs until the very last steps.
        `target_features` (N, D) of zeros and ones: a feature counts where 1; one that never counts stays as it was.
        """
        y_0, target_features = y_0.to(self.centre.device), target_features.to(self.centre.device)
        weight = target_features / target_features.sum(0).clamp(min=1)
        centre = (weight * y_0).sum(0)
        scale = (weight * (y_0 - centre) ** 2).sum(0).sqrt().clamp(min=1e-4)
        counts = target_features.sum(0) > 0
        self.centre.copy_(torch.where(counts, centre, self.centre))
        self.scale.copy_(torch.where(counts, scale, self.scale))

    def block_embeddings(self, t: Tensor, condition: Tensor | None = None, keep: Tensor | None = None) -> list[Tensor]:
        """What each block adds inside its branch, (B, width): W_t·SiLU(embedding of t) + W_c·SiLU(condition).

        t (B,); condition (B, C) of the sources, or None for none; keep (B, 1) of zeros and ones withholds it where 0.
        """
        step = F.silu(self.step_mlp(step_embedding(t, self.config.width)))
        blocks = cast(Sequence[MLPBlock], self.blocks)
        if self.no_condition is None:
            return [block.step(step) for block in blocks]
        nothing = self.no_condition.expand(len(t), -1)
        known = nothing if condition is None else condition
        known = F.silu(known if keep is None else torch.where(keep > 0, known, nothing))
        return [block.step(step) + cast(nn.Linear, block.condition)(known) for block in blocks]

    def denoise(self, y_t: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
        """Predict y_0 (B, D) from y_t (B, D) and the blocks' embeddings."""
        x = self.input_projection(y_t)  # (B, width)
        for block, embedding in zip(self.blocks, embeddings, strict=True):
            x = block(x, embedding)
        return cast(Tensor, self.output_projection(F.silu(self.norm(x))))  # (B, D)

    def forward(self, y_t: Tensor, t: Tensor, condition: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Predict y_0 (B, D) from y_t (B, D) at steps t (B,), int64 from 0 to schedule.steps - 1.

        Both vectors are standardised feature by feature (`fit_standardisation`): mean 0, variance 1. `condition` (B, C)
        and `keep` (B, 1) as in `block_embeddings`.
        """
        return self.denoise(y_t, self.block_embeddings(t, condition, keep))

    def squared_error(
        self,
        y_0: Tensor,
        target_features: Tensor,
        t: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum and count of ‖y_0 − ŷ_0(y_t, t)‖² over a batch (B, D), for steps t (B,) and noise (B, D).

        `target_features` (B, D) of zeros and ones: the other features are zero before noise, and bring no loss.
        """
        y_0 = target_features * (y_0 - self.centre) / self.scale
        alpha_bar = self.config.schedule.alpha_bar().float().to(y_0.device)[t]
        predicted = self(q_sample(y_0, noise, alpha_bar), t, condition, keep).float()
        return (target_features * (predicted - y_0) ** 2).sum(), target_features.sum()

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        condition: Tensor | None = None,
        target_features: Tensor | None = None,
        *,
        steps: int = 50,
    ) -> Tensor:
        """Draw one representation per generator, (B, D) float32, by DDIM of η = 1; in float32, whatever the autocast.

        `condition` (B, C), or None for p(y_0). `target_features` (B, D) as in training: the others come out as zero.
        """
        rows, device = len(generators), self.centre.device
        mask = torch.ones(rows, self.dim, device=device) if target_features is None else target_features
        timesteps = ddim_timesteps(self.config.schedule.steps, steps)
        with autocast(device, torch.float32):
            repeated = None if condition is None else condition.repeat(steps, 1)
            every = self.block_embeddings(torch.tensor(timesteps, device=device).repeat_interleave(rows), repeated)
            of_step = {t: [block[i * rows : (i + 1) * rows] for block in every] for i, t in enumerate(timesteps)}
            drawn = ddim_sample(
                lambda y_t, t: mask * self.denoise(y_t, of_step[int(t[0])]),
                (rows, self.dim),
                self.config.schedule,
                steps=steps,
                generator=generators,
                device=device,
            )
        return mask * (drawn * self.scale + self.centre)
