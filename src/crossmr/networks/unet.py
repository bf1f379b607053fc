"""The U-Nets of the masked autoencoder and the C-UNet, in two dimensions or three.

`Encoder` and `Decoder` are the published form: every block of the encoder hands a skip to the decoder, which has one
block more per level. `LightEncoder` and `LightDecoder` hand on one skip per level; per pixel they cost half as much at
the same number of parameters. Both may gather patches of pixels in their first layer, and spread them in their last.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from crossmr.errors import ConfigError

FEATURES_ALIVE = 12
"""Feature maps of the finest level, in float32, that one sample keeps at most in a forward pass without gradients:
skips, the block in progress, and what is concatenated."""

CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}


def check_images(images: Tensor, dims: int, channels: int | None = None) -> None:
    """Refuse images that are not (B, C, *S) with `dims` spatial axes and, unless None, `channels` channels.

    Raises:
        ValueError: they are of another shape.
    """
    if images.ndim != dims + 2 or images.shape[1] != (channels or images.shape[1]) or not images.numel():
        axes = "Y, X" if dims == 2 else "Z, Y, X"
        raise ValueError(f"images are {tuple(images.shape)}; expected (B, {channels or 'M'}, {axes}), none of them 0")


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Repeat the last pixels of images (B, C, *S) until every side is a multiple of `stride`; others stay uncopied."""
    missing = [-side % stride for side in reversed(images.shape[2:])]
    return F.pad(images, [n for m in missing for n in (0, m)], mode="replicate") if any(missing) else images


def crop_to(images: Tensor, size: Sequence[int]) -> Tensor:
    """The first pixels of images (B, C, *S), as many as `size` says per side."""
    if list(images.shape[2:]) == list(size):
        return images
    return images[(slice(None), slice(None), *(slice(side) for side in size))]


def convolution(dims: int, in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution over `dims` spatial axes that keeps the shape (or divides it by `stride`)."""
    return CONVOLUTION[dims](in_channels, out_channels, size, stride=stride, padding=size // 2)


def zero_init(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that the residual branch it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least four channels each.

    Fewer channels a group would erase each feature's mean, which is where contrast and scale live.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; a condition, once there is a layer for it, is added after the first one [C]."""

    def __init__(self, dims: int, in_channels: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.norm_1, self.norm_2 = group_norm(in_channels), group_norm(out_channels)
        self.conv_1 = convolution(dims, in_channels, out_channels)
        self.conv_2 = zero_init(convolution(dims, out_channels, out_channels))
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else convolution(dims, in_channels, out_channels, size=1)
        )
        self.condition: nn.Linear | None = None

    def add_condition(self, dim: int) -> None:
        """Give the block a layer that lets a condition (B, dim) in."""
        self.condition = nn.Linear(dim, self.out_channels)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Map features (B, in_channels, *S) and condition (B, dim) to (B, out_channels, *S)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        if self.condition is not None and c is not None:
            h += self.condition(F.silu(c))[(...,) + (None,) * (h.ndim - 2)]
        h = self.conv_2(F.silu(self.norm_2(h)))
        return cast(Tensor, self.shortcut(x) + h)


class SelfAttention(nn.Module):
    """Attention of every position to every other, with a residual connection."""

    def __init__(self, dims: int, channels: int, head_channels: int = 32):
        super().__init__()
        most = max(1, channels // head_channels)
        self.heads = max(heads for heads in range(1, most + 1) if channels % heads == 0)
        self.norm = group_norm(channels)
        self.to_qkv = convolution(dims, channels, 3 * channels, size=1)
        self.to_out = zero_init(convolution(dims, channels, channels, size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, C, *S) to (B, C, *S)."""
        shape = x.shape
        qkv = self.to_qkv(self.norm(x)).flatten(2)  # (B, 3C, N)
        q, k, v = rearrange(qkv, "b (three h d) n -> three b h n d", three=3, h=self.heads)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b (h d) n")
        return cast(Tensor, x + self.to_out(out.reshape(shape)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked."""

    def __init__(self, dims: int, in_channels: Sequence[int], out_channels: int, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(dims, width, out_channels) for width in in_channels)
        self.attentions = nn.ModuleList(
            SelfAttention(dims, out_channels) if attention else nn.Identity() for _ in in_channels
        )

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Map features (B, in_channels, *S) to (B, out_channels, *S)."""
        for block, attention in self.steps():
            x = attention(block(x, c))
        return x

    def steps(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each block and the attention after it."""
        return zip(self.blocks, self.attentions, strict=True)


@dataclass(frozen=True)
class UNetShape:
    """Levels and widths that the two halves of one U-Net share."""

    dims: int
    """Spatial axes, 2 or 3."""
    channels: int
    """Features of the finest level."""
    multipliers: Sequence[int]
    """Features of each level, as multiples of `channels`; each level halves the resolution."""
    blocks: int
    """Residual blocks per level of the encoder; the published decoder has one more."""
    patch: int = 1
    """Side of the patches of pixels that the first layer gathers and the last one spreads: 1, or an even number."""

    def __post_init__(self) -> None:
        if self.dims not in CONVOLUTION:
            raise ConfigError(f"spatial_dims is {self.dims}; expected 2 for slices or 3 for volumes.")

    @property
    def widths(self) -> list[int]:
        """Features of each level, finest first."""
        return [self.channels * m for m in self.multipliers]


class PatchEmbed(nn.Module):
    """The first layer: images (B, in_channels, *S) to features (B, width, *S/patch), overlapping where patch > 1."""

    def __init__(self, shape: UNetShape, in_channels: int):
        super().__init__()
        patch, width = shape.patch, shape.widths[0]
        self.conv = (
            convolution(shape.dims, in_channels, width)
            if patch == 1
            else CONVOLUTION[shape.dims](in_channels, width, 2 * patch, stride=patch, padding=patch // 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed."""
        return cast(Tensor, self.conv(images))


class PatchExpand(nn.Module):
    """The last layer: features (B, width, *S/patch) to images (B, out_channels, *S).

    Where patch > 1, one convolution makes all pixels of a patch; two more, at full resolution, then correct them beside
    the images that the U-Net read, so that patches leave no pattern and the sources' detail is not lost. The correction
    starts at zero.
    """

    HIDDEN = 16

    def __init__(self, shape: UNetShape, in_channels: int, out_channels: int):
        super().__init__()
        dims, self.patch, width = shape.dims, shape.patch, shape.widths[0]
        self.norm = group_norm(width)
        self.out = convolution(dims, width, out_channels * self.patch**dims)
        self.correct: nn.Module | None = None
        if self.patch > 1:
            last = zero_init(convolution(dims, self.HIDDEN, out_channels))
            self.correct = nn.Sequential(convolution(dims, out_channels + in_channels, self.HIDDEN), nn.SiLU(), last)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """Expand features x, beside the images (B, in_channels, *S) of full resolution."""
        x = self.out(F.silu(self.norm(x)))
        if self.correct is None:
            return x
        if x.ndim == 4:
            x = F.pixel_shuffle(x, self.patch)
        else:
            parts = {"p": self.patch, "q": self.patch, "r": self.patch}
            x = rearrange(x, "b (c p q r) z y x -> b c (z p) (y q) (x r)", **parts)
        return cast(Tensor, x + self.correct(torch.cat([x, images.to(x.dtype)], 1)))


class Encoder(nn.Module):
    """Input convolution, the downward half of a U-Net, and its middle block."""

    def __init__(self, shape: UNetShape, in_channels: int):
        super().__init__()
        dims, widths = shape.dims, shape.widths
        self.stem = PatchEmbed(shape, in_channels)
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for depth, out_channels in enumerate(widths):
            last = depth == len(widths) - 1
            self.levels.append(Level(dims, [width] + [out_channels] * (shape.blocks - 1), out_channels, last))
            self.downs.append(nn.Identity() if last else convolution(dims, out_channels, out_channels, stride=2))
            width = out_channels
        self.middle_1 = ResidualBlock(dims, width, width)
        self.middle_attention = SelfAttention(dims, width)
        self.middle_2 = ResidualBlock(dims, width, width)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Map images (B, in_channels, *S) to features (B, width, *S/stride) and the skips, finest first."""
        x = self.stem(x)
        skips = [x]
        for depth, (level, down) in enumerate(zip(self.levels, self.downs, strict=True)):
            for block, attention in cast(Level, level).steps():
                x = attention(block(x, c))
                skips.append(x)
            if depth < len(self.levels) - 1:
                x = down(x)
                skips.append(x)
        x = self.middle_2(self.middle_attention(self.middle_1(x, c)), c)
        return x, skips


class Decoder(nn.Module):
    """The upward half of a U-Net, with or without the skips from its encoder."""

    def __init__(self, shape: UNetShape, in_channels: int, out_channels: int, *, skips: bool = True):
        super().__init__()
        dims, widths, blocks = shape.dims, shape.widths, shape.blocks
        skip_widths = [widths[0]]  # of the first layer; then, by level, of its blocks and what halves it
        for depth, width in enumerate(widths):
            skip_widths += [width] * (blocks + (depth < len(widths) - 1))
        self.skips = skips
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        width = widths[-1]
        for depth in reversed(range(len(widths))):
            joined = []
            for _ in range(blocks + 1):
                joined.append(width + (skip_widths.pop() if skips else 0))
                width = widths[depth]
            self.levels.append(Level(dims, joined, width, depth == len(widths) - 1))
            self.ups.append(convolution(dims, width, width) if depth else nn.Identity())
        self.out = PatchExpand(shape, in_channels, out_channels)

    def forward(self, x: Tensor, skips: list[Tensor], images: Tensor, c: Tensor | None = None) -> Tensor:
        """Map deep features, skips and the encoder's images (B, in_channels, *S) to images (B, out_channels, *S)."""
        skips = list(skips)
        for depth, (level, up) in enumerate(zip(self.levels, self.ups, strict=True)):
            for block, attention in cast(Level, level).steps():
                if self.skips:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = attention(block(x, c))
            if depth < len(self.levels) - 1:
                x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return cast(Tensor, self.out(x, images))


class LightEncoder(nn.Module):
    """The downward half of a U-Net that hands on one skip per level, and its middle blocks."""

    def __init__(self, shape: UNetShape, in_channels: int):
        super().__init__()
        dims, widths = shape.dims, shape.widths
        self.stem = PatchEmbed(shape, in_channels)
        self.levels = nn.ModuleList(Level(dims, [width] * shape.blocks, width, False) for width in widths)
        self.downs = nn.ModuleList(
            CONVOLUTION[dims](fine, coarse, 2, stride=2) for fine, coarse in itertools.pairwise(widths)
        )
        self.middle = Level(dims, [widths[-1]] * 2, widths[-1], False)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Map images (B, in_channels, *S) to features (B, width, *S/stride) and the skips, finest first."""
        x, skips = self.stem(x), []
        for depth, level in enumerate(self.levels):
            x = level(x, c)
            if depth < len(self.downs):
                skips.append(x)
                x = self.downs[depth](x)
        return self.middle(x, c), skips


class LightDecoder(nn.Module):
    """The upward half: per level, features are narrowed, doubled in size, and joined with the skip."""

    def __init__(self, shape: UNetShape, in_channels: int, out_channels: int):
        super().__init__()
        dims, widths = shape.dims, shape.widths
        pairs = list(itertools.pairwise(widths))[::-1]
        self.ups = nn.ModuleList(convolution(dims, coarse, fine, size=1) for fine, coarse in pairs)
        self.levels = nn.ModuleList(
            Level(dims, [2 * fine] + [fine] * (shape.blocks - 1), fine, False) for fine, _ in pairs
        )
        self.out = PatchExpand(shape, in_channels, out_channels)

    def forward(self, x: Tensor, skips: list[Tensor], images: Tensor, c: Tensor | None = None) -> Tensor:
        """Map deep features, skips and the encoder's images (B, in_channels, *S) to images (B, out_channels, *S)."""
        for up, level, skip in zip(self.ups, self.levels, reversed(skips), strict=True):
            x = level(torch.cat([F.interpolate(up(x), scale_factor=2.0, mode="nearest"), skip], 1), c)
        return cast(Tensor, self.out(x, images))
