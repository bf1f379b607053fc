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

from crossmr.diffusion import Schedule, ddim_sample, ddim_timesteps, q_sample
from crossmr.errors import ConfigError
from crossmr.layers import convolution, group_norm, zeroed


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

    def forward(self, x: Tensor, addition: Tensor) -> Tensor:
        """Map (B, width) to (B, width); `addition` is the projected embedding."""
        return cast(Tensor, x + self.linear(F.silu(self.norm(x))) + addition)


class GridBlock(nn.Module):
    """The same over a grid of cells: two convolutions, so that neighbouring cells agree."""

    def __init__(self, dims: int, width: int):
        super().__init__()
        self.norm_1, self.norm_2 = group_norm(width), group_norm(width)
        self.conv_1 = convolution(dims, width, width)
        self.conv_2 = zeroed(convolution(dims, width, width))
        self.embedding = convolution(dims, width, width, size=1)

    def forward(self, x: Tensor, addition: Tensor) -> Tensor:
        """Map (B, width, *G) to (B, width, *G); `addition` is the projected embedding."""
        h = self.conv_1(F.silu(self.norm_1(x))) + addition
        return cast(Tensor, x + self.conv_2(F.silu(self.norm_2(h))))


class DistributionNetwork(nn.Module):
    """Predicts the clean representation ŷ_0(y_t, t, condition)."""

    def __init__(self, config: DistributionConfig, dim: int, condition_dim: int, grid_dims: int = 0):
        super().__init__()
        width = config.width

        def linear(inputs: int, outputs: int) -> nn.Module:
            return convolution(grid_dims, inputs, outputs, size=1) if grid_dims else nn.Linear(inputs, outputs)

        self.config, self.dim, self.grid_dims = config, dim, grid_dims
        self.embed_step = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_condition = linear(condition_dim, width) if config.conditional else None
        self.no_condition = nn.Parameter(torch.zeros(width)) if config.conditional else None
        self.inwards = linear(dim, width)
        self.blocks = nn.ModuleList(
            GridBlock(grid_dims, width) if grid_dims else MLPBlock(width) for _ in range(config.blocks)
        )
        self.norm = group_norm(width) if grid_dims else nn.LayerNorm(width)
        self.outwards = zeroed(linear(width, dim))
        self.register_buffer("alpha_bar", config.schedule.alpha_bar().float(), persistent=False)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def standardise(self, y_0: Tensor, wanted: Tensor | None = None) -> None:
        """Take each feature's mean and deviation over training vectors (N, D[, *G]), so that unit variance diffuses.

        Z-scored vectors share most of their direction and would be told from their mean at the very last steps only.
        `wanted` (N, D) of zeros and ones: where 0, the feature does not count; one that never counts stays as it was.
        """
        weight = torch.ones(y_0.shape[:2]) if wanted is None else wanted
        share = weight / weight.sum(0).clamp(min=1)  # (N, D)
        centre = (share * y_0.flatten(2).mean(-1) if self.grid_dims else share * y_0).sum(0)
        squared = (y_0 - centre[(...,) + (None,) * self.grid_dims]) ** 2
        variance = (share * (squared.flatten(2).mean(-1) if self.grid_dims else squared)).sum(0)
        counted, known = weight.sum(0) > 0, cast(dict[str, Tensor], self._buffers)
        known["centre"][counted] = centre[counted]
        known["scale"][counted] = variance.sqrt().clamp(min=1e-4)[counted]

    def additions(self, t: Tensor, condition: Tensor | None = None, keep: Tensor | None = None) -> list[Tensor]:
        """What the blocks add, (B, width[, *G]) each: the projected embeddings of steps t (B,) and condition.

        condition (B, C[, *G]) is what is known of the sources; keep (B, 1) of zeros and ones withholds it where 0.
        """
        cells = (...,) + (None,) * self.grid_dims
        embedding = self.embed_step(step_embedding(t, self.config.width))[cells]  # (B, width[, 1, ...])
        if self.embed_condition is not None:
            told = self.no_condition[cells].expand_as(embedding)  # type: ignore[index]
            if condition is not None:
                known = self.embed_condition(condition)
                told = known if keep is None else torch.where(keep[cells] > 0, known, told)
            embedding = embedding + told
        return [block.embedding(F.silu(embedding)) for block in self.blocks]  # type: ignore[operator]

    def forward(
        self,
        y_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        keep: Tensor | None = None,
        additions: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict y_0 (B, D[, *G]) from y_t of the same shape at steps t (B,); the rest as `additions`, or these."""
        x = self.inwards(y_t)  # (B, width[, *G])
        for block, addition in zip(self.blocks, additions or self.additions(t, condition, keep), strict=True):
            x = block(x, addition)
        return cast(Tensor, self.outwards(F.silu(self.norm(x))))  # (B, D)

    def loss(
        self, y_0: Tensor, condition: Tensor | None, generator: torch.Generator, wanted: Tensor | None = None
    ) -> Tensor:
        """‖y_0 − ŷ_0(y_t, t)‖², averaged over a batch (B, D[, *G]); steps and noise are drawn from `generator`.

        `wanted` (B, D) of zeros and ones: the other features are noise about nothing, and bring no loss.
        """
        cells = (...,) + (None,) * self.grid_dims
        weight = torch.ones_like(y_0) if wanted is None else wanted[cells].expand_as(y_0)
        y_0 = weight * (y_0 - self.centre[cells]) / self.scale[cells]  # type: ignore[index]
        batch = y_0.shape[0]
        t = torch.randint(self.config.schedule.steps, (batch,), generator=generator)
        noise = torch.randn(y_0.shape, generator=generator)
        keep = (torch.rand(batch, 1, generator=generator) >= self.config.condition_dropout).float()
        t, noise, keep = t.to(y_0.device), noise.to(y_0.device), keep.to(y_0.device)
        y_t = q_sample(y_0, noise, self.alpha_bar[t])  # type: ignore[index]
        squared = (cast(Tensor, self(y_t, t, condition, keep)).float() - y_0) ** 2
        return (weight * squared).sum() / weight.sum().clamp(min=1)

    @torch.no_grad()
    def sample(
        self,
        generators: Sequence[torch.Generator],
        condition: Tensor | None = None,
        *,
        grid: Sequence[int] = (),
        wanted: Tensor | None = None,
        steps: int = 50,
        eta: float = 1.0,
    ) -> Tensor:
        """Draw one representation a generator, (B, D), by DDIM; `condition` (B, C), or None for p(y_0).

        A network over grids draws (B, D, *grid) and is told (B, C, *grid). `wanted` (B, D) as in `loss`: what is not
        wanted comes out as the mean.
        """
        cells, device = (...,) + (None,) * self.grid_dims, next(self.parameters()).device
        known: dict[int, list[Tensor]] = {}

        def predict(y_t: Tensor, t: Tensor) -> Tensor:
            additions = known[int(t[0])] if known else None
            predicted = cast(Tensor, self(y_t, t, condition, additions=additions)).float()
            return predicted if wanted is None else predicted * wanted[cells]

        # a vector's steps wait for the weights: they are not cast at every step, and half of them read once for all
        mixed = torch.is_autocast_enabled(device.type) and bool(self.grid_dims)
        with torch.autocast(device.type, torch.get_autocast_dtype(device.type), enabled=mixed):
            if not self.grid_dims:
                known = self._all_additions(
                    ddim_timesteps(self.config.schedule.steps, steps), len(generators), condition
                )
            drawn = ddim_sample(
                predict,
                (len(generators), self.dim, *grid),
                self.config.schedule,
                steps=steps,
                eta=eta,
                generator=generators,
                device=device,
            )
        return drawn * self.scale[cells] + self.centre[cells]  # type: ignore[index]

    def _all_additions(self, steps: Sequence[int], rows: int, condition: Tensor | None) -> dict[int, list[Tensor]]:
        """`additions` of a batch of `rows` vectors at each of these steps."""
        t = torch.tensor(steps, device=cast(Tensor, self.alpha_bar).device).repeat_interleave(rows)
        told = None if condition is None else condition.repeat(len(steps), 1)
        parts = [part.reshape(len(steps), rows, -1) for part in self.additions(t, told)]
        return {step: [part[index] for part in parts] for index, step in enumerate(steps)}
