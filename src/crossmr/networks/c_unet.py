"""Stage 3, C-UNet: acquired modalities in, missing ones out, in one pass, guided by a representation.

The Condition Embedding turns the representation into c = W₂·SiLU(W₁·y_0); every residual block adds
Linear(SiLU(c)) to its features after its first convolution (Xing et al. 2024). These condition layers learn together
with the rest, as published, or last: the rest is trained without guidance and then left alone, so that the unguided
pass stays what a network without guidance gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from crossmr.errors import ConfigError
from crossmr.networks.unet import Decoder, Encoder, Form, ResidualBlock, zero_init


@dataclass(frozen=True)
class SynthesisConfig:
    """The C-UNet's form."""

    channels: int = 96
    """Features of the finest level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    """Features of each level, as multiples of `channels`; each level halves the resolution."""
    blocks: int = 1
    """Residual blocks per level of the encoder (the decoder has one more)."""
    condition_width: int | None = None
    """Features of the condition c; None for as many as the representation has."""
    residual: bool = False
    """Whether the network learns what is to be added to the linear regression of the sources."""
    loss: Literal["squared", "absolute"] = "squared"
    """Of the error; 'squared' is published [C]."""

    def __post_init__(self) -> None:
        width = 1 if self.condition_width is None else self.condition_width
        if not self.multipliers or min(self.channels, self.blocks, width, *self.multipliers) < 1:
            raise ConfigError("channels, multipliers, blocks and condition_width are counts of at least 1.")

    @property
    def stride(self) -> int:
        """Pixels from one of the deepest features to the next."""
        return int(2 ** (len(self.multipliers) - 1))


class ConditionEmbedding(nn.Module):
    """c = W₂·SiLU(W₁·y_0)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y_0: Tensor) -> Tensor:
        """Embed y_0 (B, D) to c (B, width)."""
        return cast(Tensor, self.embed(y_0))


def availability(inputs: Tensor, sources: int) -> Tensor:
    """Which sources the maps at the end of these inputs say are available, (B, S) of zeros and ones."""
    return (inputs[:, -sources:].flatten(2).amax(-1) > 0).to(inputs)


class LinearRegression(nn.Module):
    """The least-squares regression of the targets on the sources and a constant; for any subset, on the available ones.

    It reads what the C-UNet reads: S·context channels, then, for any subset, S maps. Its weights are fitted, not
    learnt: (patterns, S + 1, T), a pattern being the sum of 2^s over the sources s that are available.
    """

    weights: Tensor

    def __init__(self, sources: int, targets: int, context: int = 1, *, any_subset: bool = False):
        super().__init__()
        self.sources, self.context, self.any_subset = sources, context, any_subset
        self.register_buffer("weights", torch.zeros(2**sources if any_subset else 1, sources + 1, targets))

    def forward(self, inputs: Tensor) -> Tensor:
        """Predict (B, T, context, *S), float32, from inputs (B, inputs, *S): each slice of context by itself."""
        neighbours = self._neighbours(inputs).float()
        pattern = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
        if self.any_subset:
            available = availability(inputs, self.sources) > 0
            pattern = (available * 2 ** torch.arange(self.sources, device=inputs.device)).sum(1)
        weights = self.weights[pattern]  # (B, S + 1, T)
        with torch.autocast(inputs.device.type, enabled=False):  # half a promille of the intensity range would show
            predicted = torch.einsum("bsc...,bst->btc...", neighbours, weights[:, :-1])
        return predicted + weights[:, -1][(...,) + (None,) * (predicted.ndim - 2)]

    def fill(self, inputs: Tensor, predicted: Tensor) -> Tensor:
        """The inputs (B, inputs, *S) of any subset, with the prediction (B, S, context, *S) for what is missing."""
        neighbours, maps = self._neighbours(inputs), inputs[:, -self.sources :]
        whole = torch.where(maps[:, :, None] > 0, neighbours, predicted.to(neighbours.dtype))
        filled = torch.cat([whole.flatten(1, 2), maps], 1)
        return filled.contiguous(memory_format=torch.channels_last) if filled.ndim == 4 else filled

    def _neighbours(self, inputs: Tensor) -> Tensor:
        """The images of the inputs, (B, S, context, *S)."""
        return rearrange(inputs[:, : self.sources * self.context], "b (s c) ... -> b s c ...", c=self.context)


class CUNet(nn.Module):
    """U-Net from input channels to T target channels; without `representation_dim`, one that nothing guides.

    `regression` is what it starts from: its output is added to that, and what is missing of any subset is filled with
    the regression's prediction. The condition layers are made last, so that the rest starts as a network that nothing
    guides does; they start at zero where they are trained last (`zero_condition`).
    """

    def __init__(
        self,
        config: SynthesisConfig,
        inputs: int,
        targets: int,
        spatial_dims: int = 2,
        *,
        representation_dim: int | None = None,
        regression: LinearRegression | None = None,
    ):
        super().__init__()
        form = Form(spatial_dims, config.channels, config.multipliers, config.blocks)
        self.regression = regression
        self.encoder = Encoder(form, inputs)
        self.decoder = Decoder(form, targets)
        if regression is not None:
            zero_init(self.decoder.out)
        self.condition: ConditionEmbedding | None = None
        if representation_dim is not None:
            width = config.condition_width or representation_dim
            self.condition = ConditionEmbedding(representation_dim, width)
            for block in self._blocks():
                block.add_condition(width)

    def forward(self, inputs: Tensor, y_0: Tensor | None = None) -> Tensor:
        """Synthesise targets (B, T, *S), on the [0, 1] scale but not clipped, from inputs (B, inputs, *S).

        y_0 (B, D) is the guidance; without, the condition layers add nothing.
        """
        c = None if self.condition is None or y_0 is None else self.condition(y_0)
        if self.regression is None:
            return cast(Tensor, self.decoder(*self.encoder(inputs, c), c))
        predicted = cast(Tensor, self.regression(inputs))
        if self.regression.any_subset:
            inputs = self.regression.fill(inputs, predicted)
        return cast(Tensor, self.decoder(*self.encoder(inputs, c), c)) + predicted[:, :, predicted.shape[2] // 2]

    def zero_condition(self) -> None:
        """Zero what lets the condition into the blocks, so that guidance starts by changing nothing."""
        for block in self._blocks():
            if block.condition is not None:
                zero_init(block.condition)

    def condition_layers(self) -> Sequence[nn.Parameter]:
        """The parameters of the Condition Embedding and of the layers that let it into the blocks."""
        return [parameter for name, parameter in self.named_parameters() if "condition" in name.split(".")]

    def _blocks(self) -> list[ResidualBlock]:
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]


def synthesis_error(prediction: Tensor, truth: Tensor, target_mask: Tensor, *, absolute: bool) -> tuple[Tensor, Tensor]:
    """L_Syn as sum and count: the mean squared or absolute error of each image (B, T, *S), over target_mask (B, T)."""
    error = prediction.float() - truth
    return masked_sum(error.abs() if absolute else error**2, target_mask)


def masked_sum(values: Tensor, target_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the means of the images (B, T, *S) that target_mask (B, T) has, and their count."""
    return (values.flatten(2).mean(-1) * target_mask).sum(), target_mask.sum()
