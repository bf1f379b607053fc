"""Stage 3, C-UNet: acquired modalities in, missing ones out, in one pass, guided by a representation.

The Condition Embedding turns the representation into c = W₂·SiLU(W₁·y_0); every residual block adds
Linear(SiLU(c)) to its features after its first convolution (Xing et al. 2024). These condition layers learn together
with the rest, as published, or last: the rest is trained without guidance and then left alone, so that the unguided
pass stays what a network without guidance gives.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange
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
    condition_width: int | None = None
    """Features of the condition c; None for as many as the representation has."""
    residual: bool = False
    """Whether the network learns what is to be added to the least-squares mix of the sources."""
    loss: Literal["squared", "absolute"] = "squared"
    """Of the error; 'squared' is published [C]."""

    def __post_init__(self) -> None:
        width = 1 if self.condition_width is None else self.condition_width
        if not self.multipliers or min(self.channels, self.blocks, width, *self.multipliers) < 1:
            raise ConfigError("channels, multipliers, blocks and condition_width are counts of at least 1.")

    @property
    def divisor(self) -> int:
        """What every side of an image must be a multiple of."""
        return int(2 ** (len(self.multipliers) - 1))


class ConditionEmbedding(nn.Module):
    """c = W₂·SiLU(W₁·y_0), and, where the network learns it, a vector for 'no guidance'."""

    def __init__(self, dim: int, width: int, *, no_guidance: bool = True):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))
        self.no_guidance = nn.Parameter(torch.zeros(width)) if no_guidance else None

    def forward(self, y_0: Tensor | None, batch: int, keep: Tensor | None = None) -> Tensor | None:
        """Embed y_0 (B, D[, *G]) to c (B, width[, *G]).

        For no guidance, y_0 = None or keep (B, 1) = 0, c is the learnt vector, or None where there is none.
        """
        nothing = None if self.no_guidance is None else self.no_guidance.expand(batch, -1)
        if y_0 is None:
            return nothing
        embedded = self.embed(y_0.movedim(1, -1)).movedim(-1, 1)
        if keep is None or nothing is None:
            return cast(Tensor, embedded)
        cells = (...,) + (None,) * (embedded.ndim - 2)
        return torch.where(keep[cells] > 0, embedded, nothing[cells])


def central_slices(inputs: Tensor, sources: int, context: int) -> Tensor:
    """Of what the C-UNet reads, (B, S·context[ + S], *S), the slice of each source that is synthesised: (B, S, *S)."""
    return inputs[:, context // 2 : sources * context : context]


def shown_sources(inputs: Tensor, sources: int) -> Tensor:
    """Which sources the maps at the end of these inputs say are shown, (B, S) of zeros and ones."""
    return (inputs[:, -sources:].flatten(2).amax(-1) > 0).to(inputs)


class LinearMix(nn.Module):
    """The least-squares mix of the sources and a constant; where any subset may be missing, of those that are shown.

    It reads what the C-UNet reads: S·context channels, then, for any subset, S maps. Its weights are fitted, not
    learnt: (patterns, S + 1, T), a pattern being the sum of 2^s over the sources s that are shown.
    """

    def __init__(self, sources: int, targets: int, context: int = 1, *, any_subset: bool = False):
        super().__init__()
        self.sources, self.context, self.any_subset = sources, context, any_subset
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(2**sources if any_subset else 1, sources + 1, targets))

    def forward(self, inputs: Tensor) -> Tensor:
        """Mix (B, inputs, *S) to (B, T, context, *S), float32: each slice of context by itself."""
        around = self._around(inputs).float()
        pattern = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
        if self.any_subset:
            shown = shown_sources(inputs, self.sources) > 0
            pattern = (shown * 2 ** torch.arange(self.sources, device=inputs.device)).sum(1)
        weights = self.weights[pattern]  # (B, S + 1, T)
        with torch.autocast(inputs.device.type, enabled=False):  # half a promille of the intensity range would show
            mixed = torch.einsum("bsc...,bst->btc...", around, weights[:, :-1])
        return mixed + weights[:, -1][(...,) + (None,) * (mixed.ndim - 2)]

    def fill(self, inputs: Tensor, mixed: Tensor) -> Tensor:
        """The inputs (B, inputs, *S) of any subset, with the mix (B, S, context, *S) for what is not shown."""
        around, maps = self._around(inputs), inputs[:, -self.sources :]
        whole = torch.where(maps[:, :, None] > 0, around, mixed.to(around.dtype))
        filled = torch.cat([whole.flatten(1, 2), maps], 1)
        return filled.contiguous(memory_format=torch.channels_last) if filled.ndim == 4 else filled

    def _around(self, inputs: Tensor) -> Tensor:
        """The images of the inputs, (B, S, context, *S)."""
        return rearrange(inputs[:, : self.sources * self.context], "b (s c) ... -> b s c ...", c=self.context)


class CUNet(nn.Module):
    """U-Net from S source channels to T target channels; without `representation_dim`, its unguided twin.

    `guided_last`: its condition layers start at zero and are trained alone, after the rest; no y_0, no addition.
    `mix`: what it starts from; its output is added to that, and what is not shown of any subset is seen as the mix.
    """

    def __init__(
        self,
        config: SynthesisConfig,
        sources: int,
        targets: int,
        representation_dim: int | None,
        spatial_dims: int = 2,
        *,
        guided_last: bool = False,
        mix: LinearMix | None = None,
    ):
        super().__init__()
        self.mix = mix
        self.absolute = config.loss == "absolute"
        width = None if representation_dim is None else config.condition_width or representation_dim
        self.condition = None
        if representation_dim is not None and width is not None:
            self.condition = ConditionEmbedding(representation_dim, width, no_guidance=not guided_last)
        form = (config.channels, config.multipliers, config.blocks, width)
        self.encoder = Encoder(spatial_dims, sources, *form)
        self.decoder = Decoder(spatial_dims, targets, *form)
        if guided_last:
            self.zero_condition_layers()
        if mix is not None:
            zeroed(self.decoder.out)

    def forward(self, sources: Tensor, y_0: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Synthesise targets (B, T, *S), on the [0, 1] scale but not clipped, from sources (B, S, *S).

        y_0 (B, D[, *G]) is the guidance, or None; keep (B, 1) of zeros and ones withholds it sample by sample.
        """
        c = None if self.condition is None else self.condition(y_0, sources.shape[0], keep)
        if self.mix is None:
            return cast(Tensor, self.decoder(*self.encoder(sources, c), c))
        mixed = cast(Tensor, self.mix(sources))
        if self.mix.any_subset:
            sources = self.mix.fill(sources, mixed)
        return cast(Tensor, self.decoder(*self.encoder(sources, c), c)) + mixed[:, :, mixed.shape[2] // 2]

    def zero_condition_layers(self) -> None:
        """Zero what lets the guidance into the blocks."""
        for module in self.modules():
            if isinstance(module, ResidualBlock) and module.condition is not None:
                zeroed(module.condition)

    def condition_layers_only(self) -> None:
        """Let nothing but the condition layers learn."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("condition" in name.split("."))

    def loss(
        self,
        sources: Tensor,
        targets: Tensor,
        present: Tensor,
        y_0: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """L_Syn, the squared or absolute error over the targets (B, T, *S) that each patient has (present (B, T))."""
        error = self(sources, y_0, keep).float() - targets
        return mean_where_present(error.abs() if self.absolute else error**2, present)


def mean_where_present(loss: Tensor, present: Tensor) -> Tensor:
    """The mean of (B, T, *S) over the images that patients have, present (B, T)."""
    per_image = loss.flatten(2).mean(-1)
    return (per_image * present).sum() / present.sum().clamp(min=1)
