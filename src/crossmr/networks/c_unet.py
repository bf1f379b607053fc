"""Stage 3, C-UNet: acquired modalities in, missing ones out, in one pass, guided by a representation.

The Condition Embedding turns the representation into c = W₂·SiLU(W₁·y_0); every residual block adds
Linear(SiLU(c)) to its features after its first convolution (Xing et al. 2024). These condition layers learn together
with the rest, as published, or last: the rest is trained without guidance and then left alone, so that the unguided
pass stays what a network without guidance gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from crossmr.errors import ConfigError
from crossmr.networks.unet import (
    Decoder,
    Encoder,
    LightDecoder,
    LightEncoder,
    ResidualBlock,
    UNetShape,
    check_images,
    crop_to,
    pad_to_stride,
    zero_init,
)


@dataclass(frozen=True)
class SynthesisConfig:
    """The C-UNet's form."""

    channels: int = 96
    """Features of the finest level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    """Features of each level, as multiples of `channels`; each level halves the resolution."""
    blocks: int = 1
    """Residual blocks per level of the encoder."""
    patch: int = 1
    """Side of the patches of pixels that the first layer gathers: 1, as published, or an even number."""
    form: Literal["published", "light"] = "published"
    """Of the U-Net: the published one, or one with a skip per level and without attention, at half its cost."""
    condition_width: int | None = None
    """Features of the condition c; None for as many as the representation has."""
    loss: Literal["squared", "absolute"] = "squared"
    """Of the error; 'squared' is published [C]."""
    lesion_weight: float = 0.0
    """What the error counts in a lesion in addition to 1, by a study's labels; twice as much where it enhances."""

    def __post_init__(self) -> None:
        width = 1 if self.condition_width is None else self.condition_width
        if not self.multipliers or min(self.channels, self.blocks, width, *self.multipliers) < 1:
            raise ConfigError("channels, multipliers, blocks and condition_width are counts of at least 1.")
        if self.patch != 1 and (self.patch < 1 or self.patch % 2):
            raise ConfigError(f"patch is {self.patch}; expected 1 or an even number, such as 2.")
        if not 0 <= self.lesion_weight < math.inf:
            raise ConfigError(f"lesion_weight is {self.lesion_weight}; expected 0 or more.")

    @property
    def stride(self) -> int:
        """Pixels from one of the deepest features to the next."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))


class ConditionEmbedding(nn.Module):
    """c = W₂·SiLU(W₁·y_0)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y_0: Tensor) -> Tensor:
        """Embed y_0 (B, D) to c (B, width)."""
        return cast(Tensor, self.embed(y_0))


class CUNet(nn.Module):
    """U-Net from input channels to output channels; without `representation_dim`, one that nothing guides.

    `CUNet(SynthesisConfig(channels=32), in_channels=3, out_channels=1)` for slices of three channels;
    `spatial_dims=3` for volumes; `representation_dim=D` for a network that vectors of D features guide. The condition
    layers are made last, so that the rest starts as a network that nothing guides does; they start at zero where they
    are trained last (`zero_condition`).
    """

    def __init__(
        self,
        config: SynthesisConfig = SynthesisConfig(),
        in_channels: int = 1,
        out_channels: int = 1,
        spatial_dims: int = 2,
        *,
        representation_dim: int | None = None,
    ):
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise ConfigError(f"in_channels is {in_channels}, out_channels {out_channels}; expected at least 1 each.")
        self.in_channels, self.spatial_dims, self.stride = in_channels, spatial_dims, config.stride
        shape = UNetShape(spatial_dims, config.channels, config.multipliers, config.blocks, config.patch)
        light = config.form == "light"
        self.encoder = LightEncoder(shape, in_channels) if light else Encoder(shape, in_channels)
        self.decoder = (
            LightDecoder(shape, in_channels, out_channels) if light else Decoder(shape, in_channels, out_channels)
        )
        self.condition: ConditionEmbedding | None = None
        if representation_dim is not None:
            width = config.condition_width or representation_dim
            self.condition = ConditionEmbedding(representation_dim, width)
            for block in self._blocks():
                block.add_condition(width)

    def forward(self, inputs: Tensor, y_0: Tensor | None = None) -> Tensor:
        """Map images (B, in_channels, *S) to (B, out_channels, *S).

        Both are in robust standard deviations about the head's median. A model's inputs lie in [-5, 10], 0 where
        nothing is (`scale.standardise`); its outputs have no bounds. S is (Y, X) or (Z, Y, X) of any size: within, the
        last pixels are repeated up to multiples of `stride`. y_0 (B, D) is the guidance, z-scored; without, the
        condition layers add nothing.

        Raises:
            ValueError: inputs of another number of axes or channels.
        """
        check_images(inputs, self.spatial_dims, self.in_channels)
        size, inputs = inputs.shape[2:], pad_to_stride(inputs, self.stride)
        c = None if self.condition is None or y_0 is None else self.condition(y_0)
        features, skips = self.encoder(inputs, c)
        return crop_to(self.decoder(features, skips, inputs, c), size)

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


def synthesis_error(prediction: Tensor, truth: Tensor, weight: Tensor, *, absolute: bool) -> tuple[Tensor, Tensor]:
    """L_Syn of images (B, T, *S) as sum and count: the squared or absolute error of each voxel times its weight."""
    error = prediction.float() - truth
    return ((error.abs() if absolute else error**2) * weight).sum(), weight.sum()


def deviation_error(log_scale: Tensor, prediction: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """The sum of the Laplace likelihood log b + |error| / b of images (B, T, *S), the error being taken as given.

    log_scale holds log b, b being the mean absolute error that the network expects of a voxel. The network's features
    learn by it, the prediction itself does not.
    """
    error = (prediction.detach().float() - truth).abs()
    return ((log_scale + error * (-log_scale).exp()) * weight).sum()
