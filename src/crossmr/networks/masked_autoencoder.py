"""Stage 1, MRM: a masked autoencoder that learns what each modality looks like.

Xing et al. 2024 (arXiv 2409.08500): the loss is taken over the masked patches alone. One encoder sees the image of each
modality by itself; its representation is the spatial mean of the deepest features, z-scored over the features of each
image (after RCG, Li et al. 2023).
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from crossmr.errors import ConfigError
from crossmr.networks.unet import Decoder, Encoder, UNetShape, check_images, crop_to, pad_to_stride


@dataclass(frozen=True)
class RepresentationConfig:
    """The masked autoencoder's form."""

    channels: int = 96
    """Features of the finest level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    """Features of each level, as multiples of `channels`; each level halves the resolution."""
    blocks: int = 1
    """Residual blocks per level of the encoder (the decoder has one more)."""
    decoder: Literal["u-net", "skip-free"] = "u-net"
    """'u-net' passes skips around the bottleneck, as the author's code does [C]. 'skip-free' does not, so that the
    bottleneck has to carry what the masked patches hold."""
    patch_size: int = 16
    """Side of a masked patch, in pixels."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}; expected a fraction between 0 and 1, such as 0.75.")
        counts = (self.channels, self.blocks, self.patch_size, *self.multipliers)
        if not self.multipliers or min(counts) < 1:
            raise ConfigError("channels, multipliers, blocks and patch_size are counts of at least 1.")

    @property
    def stride(self) -> int:
        """Pixels from one of the deepest features to the next."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def dim(self) -> int:
        """Length D of the representation of one image, and number of the deepest features."""
        return self.channels * self.multipliers[-1]


def random_mask(shape: tuple[int, ...], patch_size: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Hide a fixed fraction of patches, drawn afresh for each sample.

    `shape` is (B, *S). Returns float (B, 1, *S) on the CPU: 1 where hidden. Patches cut by the border count.
    """
    batch, *size = shape
    grid = [-(-side // patch_size) for side in size]
    patches = int(torch.tensor(grid).prod())
    hidden = max(1, min(patches - 1, round(mask_ratio * patches))) if patches > 1 else 1
    order = torch.rand(batch, patches, generator=generator).argsort(dim=1)
    mask = (order < hidden).float().reshape(batch, 1, *grid)
    for axis in range(2, mask.ndim):
        mask = mask.repeat_interleave(patch_size, dim=axis)
    return mask[tuple(slice(side) for side in (batch, 1, *size))]


def masked_squared_error(prediction: Tensor, image: Tensor, mask: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """L_MRM as sum and count of ‖p_r − p̂_r‖² over the masked patches R; absent modalities bring none.

    Images (B, M, *S), mask (B, 1, *S), present (B, M) of zeros and ones. Returns two scalars.
    """
    weight = mask * present[(...,) + (None,) * (image.ndim - 2)]
    return (weight * (prediction - image) ** 2).sum(), weight.sum()


def z_score(features: Tensor) -> Tensor:
    """Normalise features (..., D) to mean 0 and standard deviation 1 over the last axis."""
    return (features - features.mean(-1, keepdim=True)) / (features.std(-1, keepdim=True, unbiased=False) + 1e-6)


class MaskedAutoencoder(nn.Module):
    """FE and FD of the paper's MRM, over the image of each modality by itself.

    `MaskedAutoencoder(RepresentationConfig(channels=32), spatial_dims=2)`; `dim` is the length D of a representation.
    """

    def __init__(self, config: RepresentationConfig = RepresentationConfig(), spatial_dims: int = 2):
        super().__init__()
        self.config, self.dim, self.spatial_dims = config, config.dim, spatial_dims
        shape = UNetShape(spatial_dims, config.channels, config.multipliers, config.blocks)
        self.encoder = Encoder(shape, 1)
        self.decoder = Decoder(shape, 1, 1, skips=config.decoder == "u-net")

    def forward(self, masked: Tensor) -> Tensor:
        """Reconstruct images (B, M, *S), of any number of modalities M, whose hidden patches are zero (`random_mask`).

        S is (Y, X) or (Z, Y, X) of any size: within, the last pixels are repeated up to multiples of the config's
        `stride`. Both are standardised: in [-5, 10], robust standard deviations about the head's median (scale.py).

        Raises:
            ValueError: images of another number of axes.
        """
        check_images(masked, self.spatial_dims)
        single = pad_to_stride(rearrange(masked, "b m ... -> (b m) 1 ..."), self.config.stride)
        return crop_to(self.decoder(*self.encoder(single), single), masked.shape[2:]).reshape(masked.shape)

    def pooled(self, images: Tensor) -> Tensor:
        """Means (B, M, D) over space of the deepest features of standardised images (B, M, *S), not yet z-scored.

        Raises:
            ValueError: images of another number of axes.
        """
        check_images(images, self.spatial_dims)
        features, _ = self.encoder(rearrange(images, "b m ... -> (b m) 1 ..."))  # (B·M, D, *S/stride)
        means = reduce(features.float().flatten(2), "n d s -> n d", "mean")
        return cast(Tensor, means.reshape(*images.shape[:2], self.dim))
