"""Stage 3, C-UNet: acquired modalities in, missing ones out, in one pass, guided by a representation.

The Condition Embedding turns the representation into c = W₂·SiLU(W₁·y_0); every residual block adds
Linear(SiLU(c)) to its features after its first convolution (Xing et al. 2024).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from crossmr.errors import ConfigError
from crossmr.layers import Decoder, Encoder, ResidualBlock, zeroed


@dataclass(frozen=True)
class SynthesisConfig:
    """The C-UNet's form."""

    channels: int = 96
    """Features of the finest level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    """Features of each level, as multiples of `channels`; each level halves the resolution."""
    blocks: int = 1
    """Residual blocks a level of the encoder (the decoder has one more)."""

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.channels, self.blocks, *self.multipliers) < 1:
            raise ConfigError("channels, multipliers and blocks are counts of at least 1.")

    @property
    def divisor(self) -> int:
        """What every side of an image must be a multiple of."""
        return int(2 ** (len(self.multipliers) - 1))


class ConditionEmbedding(nn.Module):
    """c = W₂·SiLU(W₁·y_0), and a learnt vector for 'no guidance'."""

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.no_guidance = nn.Parameter(torch.zeros(dim))

    def forward(self, y_0: Tensor | None, batch: int, keep: Tensor | None = None) -> Tensor:
        """Embed y_0 (B, D[, *G]) to c of the same shape; None, or keep (B, 1) = 0, gives c for no guidance."""
        nothing = self.no_guidance.expand(batch, -1)
        if y_0 is None:
            return nothing
        embedded = self.embed(y_0.movedim(1, -1)).movedim(-1, 1)
        if keep is None:
            return cast(Tensor, embedded)
        cells = (...,) + (None,) * (embedded.ndim - 2)
        return torch.where(keep[cells] > 0, embedded, nothing[cells])


class CUNet(nn.Module):
    """U-Net from S source channels to T target channels; without `representation_dim`, its unguided twin."""

    def __init__(
        self,
        config: SynthesisConfig,
        sources: int,
        targets: int,
        representation_dim: int | None,
        spatial_dims: int = 2,
    ):
        super().__init__()
        self.condition = None if representation_dim is None else ConditionEmbedding(representation_dim)
        form = (config.channels, config.multipliers, config.blocks, representation_dim)
        self.encoder = Encoder(spatial_dims, sources, *form)
        self.decoder = Decoder(spatial_dims, targets, *form)

    def forward(self, sources: Tensor, y_0: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Synthesise targets (B, T, *S), on the [0, 1] scale but not clipped, from sources (B, S, *S).

        y_0 (B, D) is the guidance, or None; keep (B, 1) of zeros and ones withholds it sample by sample.
        """
        c = None if self.condition is None else self.condition(y_0, sources.shape[0], keep)
        features, skips = self.encoder(sources, c)
        return cast(Tensor, self.decoder(features, skips, c))

    @torch.no_grad()
    def start_from(self, twin: "CUNet") -> None:
        """Take the weights of an unguided network, and zero what lets the guidance in: it starts as the twin."""
        self.load_state_dict(twin.state_dict(), strict=False)
        for module in self.modules():
            if isinstance(module, ResidualBlock) and module.condition is not None:
                zeroed(module.condition)

    def loss(
        self,
        sources: Tensor,
        targets: Tensor,
        present: Tensor,
        y_0: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """L_Syn, the squared error over the targets (B, T, *S) that each patient has (present (B, T))."""
        error = (self(sources, y_0, keep).float() - targets) ** 2
        per_image = error.flatten(2).mean(-1)  # (B, T)
        return cast(Tensor, (per_image * present).sum() / present.sum().clamp(min=1))
