"""Stage 1, MRM: a masked autoencoder that learns what a group of modalities looks like.

Xing et al. 2024 (arXiv 2409.08500): the loss is taken over the masked patches alone. The representation is
the spatial mean of the encoder's deepest features, z-scored over its features (after RCG, Li et al. 2023), or, where
`cell` is set, a coarse grid of short vectors for each modality by itself.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from crossmr.errors import ConfigError
from crossmr.layers import Decoder, Encoder, convolution, group_norm, spread


@dataclass(frozen=True)
class RepresentationConfig:
    """The masked autoencoder's form."""

    channels: int = 96
    """Features of the finest level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    """Features of each level, as multiples of `channels`; each level halves the resolution."""
    blocks: int = 1
    """Residual blocks a level of the encoder (the decoder has one more)."""
    decoder: Literal["skip-free", "u-net"] = "skip-free"
    """'u-net' passes skips around the bottleneck as the author's code does; 'skip-free' does not, so that the
    bottleneck has to say what the masked patches hold. docs/method.md has the measurement."""
    patch_size: int = 16
    """Side of a masked patch, in pixels."""
    mask_ratio: float = 0.75
    """Share of patches hidden."""
    cell: int = 0
    """Side of a cell, in pixels, where the representation is a grid of short vectors for each modality, which one
    encoder sees by itself; 0: one pooled vector for all modalities, as published."""
    cell_features: int = 8
    """Length of the vector of a cell and modality."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}; wanted a share between 0 and 1, such as 0.75.")
        counts = (self.channels, self.blocks, self.patch_size, *self.multipliers)
        if not self.multipliers or min(counts) < 1:
            raise ConfigError("channels, multipliers, blocks and patch_size are counts of at least 1.")
        if self.cell and (self.cell < 0 or self.cell % self.stride or self.cell_features < 2):
            raise ConfigError(
                f"cell is {self.cell}, cell_features {self.cell_features}; wanted a multiple of {self.stride}, the "
                "encoder's stride, or 0, and at least 2 features."
            )
        if self.cell and self.decoder == "u-net":
            raise ConfigError("A grid of cells needs decoder 'skip-free': skips would go round it.")

    @property
    def stride(self) -> int:
        """Pixels from one of the deepest features to the next."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def dim(self) -> int:
        """Length D of the pooled representation, and number of the deepest features."""
        return self.channels * self.multipliers[-1]


def random_mask(shape: tuple[int, ...], patch_size: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Hide a fixed share of patches, drawn afresh for each sample.

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


def masked_l2(prediction: Tensor, image: Tensor, mask: Tensor, present: Tensor) -> Tensor:
    """L_MRM, the mean of ‖p_r − p̂_r‖² over the masked patches R; modalities that a patient lacks bring none.

    Images (B, M, *S), mask (B, 1, *S), present (B, M) of zeros and ones. Returns a scalar.
    """
    weight = mask * present[(...,) + (None,) * (image.ndim - 2)]
    return (weight * (prediction - image) ** 2).sum() / weight.sum().clamp(min=1)


def z_score(features: Tensor) -> Tensor:
    """Normalise (B, D[, *G]) to mean 0 and deviation 1 over the D features of each sample, or cell."""
    return (features - features.mean(1, keepdim=True)) / (features.std(1, keepdim=True, unbiased=False) + 1e-6)


class MaskedAutoencoder(nn.Module):
    """FE and FD of the paper's MRM, over the modalities of one group: as channels, or, with cells, one by one."""

    def __init__(self, config: RepresentationConfig, modalities: int, spatial_dims: int = 2):
        super().__init__()
        self.config = config
        self.dim = config.cell_features * modalities if config.cell else config.dim
        channels = 1 if config.cell else modalities
        form = (config.channels, config.multipliers, config.blocks, None)
        self.encoder = Encoder(spatial_dims, channels, *form)
        self.decoder = Decoder(spatial_dims, channels, *form, skips=config.decoder == "u-net")
        if config.cell:
            self.norm = group_norm(config.dim)
            self.to_cell = convolution(spatial_dims, config.dim, config.cell_features, size=1)
            self.from_cell = convolution(spatial_dims, config.cell_features, config.dim, size=1)

    def forward(self, masked: Tensor) -> Tensor:
        """Reconstruct images (B, M, *S) whose hidden patches are zero."""
        if not self.config.cell:
            return cast(Tensor, self.decoder(*self.encoder(masked)))
        apart = rearrange(masked, "b m ... -> (b m) 1 ...")
        deep = spread(self.from_cell(self._cells(apart)), [side // self.config.stride for side in masked.shape[2:]])
        return cast(Tensor, self.decoder(deep, [])).reshape(masked.shape)

    def _cells(self, image: Tensor) -> Tensor:
        """Images (B, 1, *S), sides multiples of the cell, to their z-scored grids (B, F, *S/cell)."""
        features, _ = self.encoder(image)
        features = nn.functional.silu(self.norm(features))
        pool = nn.functional.avg_pool2d if features.ndim == 4 else nn.functional.avg_pool3d
        return z_score(self.to_cell(pool(features, self.config.cell // self.config.stride)).float())

    def pooled(self, image: Tensor) -> Tensor:
        """The spatial mean of the deepest features, (B, D): the pooled representation before its z-score."""
        features, _ = self.encoder(image)  # (B, D, *S/8)
        return cast(Tensor, reduce(rearrange(features.float(), "b d ... -> b d (...)"), "b d n -> b d", "mean"))

    def represent(self, image: Tensor) -> Tensor:
        """The representation y_0 (B, D) of unmasked images (B, M, *S), or (B, D, *G), a cell's D = M·F features."""
        if not self.config.cell:
            return z_score(self.pooled(image))
        cells = self._cells(rearrange(image, "b m ... -> (b m) 1 ..."))
        return cells.reshape(len(image), self.dim, *cells.shape[2:])

    def loss(self, image: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
        """L_MRM of one batch: images (B, M, *S) in [0, 1], present (B, M)."""
        shape = (image.shape[0], *image.shape[2:])
        mask = random_mask(shape, self.config.patch_size, self.config.mask_ratio, generator).to(image)
        return masked_l2(self(image * (1 - mask)).float(), image, mask, present)
