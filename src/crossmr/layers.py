"""The U-Net skeleton that the masked autoencoder and the C-UNet share, in two dimensions or three."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}


def convolution(dims: int, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    """A convolution over `dims` spatial axes that keeps the shape (or divides it by `stride`)."""
    return CONVOLUTION[dims](inputs, outputs, size, stride=stride, padding=size // 2)


def zeroed(module: nn.Module) -> nn.Module:
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


def spread(c: Tensor, size: Sequence[int]) -> Tensor:
    """A vector (B, C) to (B, C, 1, ...), or a grid (B, C, *G) to (B, C, *size), each cell repeated."""
    if c.ndim == 2:
        return c[(...,) + (None,) * len(size)]
    return F.interpolate(c, size=tuple(size), mode="nearest")


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the condition is added after the first convolution [C]."""

    def __init__(self, dims: int, inputs: int, outputs: int, condition_dim: int | None):
        super().__init__()
        self.norm_1, self.norm_2 = group_norm(inputs), group_norm(outputs)
        self.conv_1 = convolution(dims, inputs, outputs)
        self.conv_2 = zeroed(convolution(dims, outputs, outputs))
        self.condition = None if condition_dim is None else nn.Linear(condition_dim, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else convolution(dims, inputs, outputs, size=1)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Map features (B, inputs, *S) and condition (B, condition_dim[, *G]) to (B, outputs, *S)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        if self.condition is not None and c is not None:
            h += spread(self.condition(F.silu(c).movedim(1, -1)).movedim(-1, 1), h.shape[2:])
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
        self.to_out = zeroed(convolution(dims, channels, channels, size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, C, *S) to (B, C, *S)."""
        shape = x.shape
        qkv = self.to_qkv(self.norm(x)).flatten(2)  # (B, 3C, N)
        q, k, v = rearrange(qkv, "b (three h d) n -> three b h n d", three=3, h=self.heads)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b (h d) n")
        return cast(Tensor, x + self.to_out(out.reshape(shape)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked."""

    def __init__(self, dims: int, inputs: Sequence[int], outputs: int, attention: bool, condition_dim: int | None):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(dims, n, outputs, condition_dim) for n in inputs)
        self.attentions = nn.ModuleList(SelfAttention(dims, outputs) if attention else nn.Identity() for _ in inputs)

    def steps(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each block and the attention after it."""
        return zip(self.blocks, self.attentions, strict=True)


class Encoder(nn.Module):
    """Input convolution, the downward half of a U-Net, and its middle block."""

    def __init__(
        self,
        dims: int,
        inputs: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        condition_dim: int | None,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.stem = convolution(dims, inputs, widths[0])
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for depth, outputs in enumerate(widths):
            last = depth == len(widths) - 1
            self.levels.append(
                Level(
                    dims,
                    [width] + [outputs] * (blocks - 1),
                    outputs,
                    attention=last,
                    condition_dim=condition_dim,
                )
            )
            self.downs.append(nn.Identity() if last else convolution(dims, outputs, outputs, stride=2))
            width = outputs
        self.middle_1 = ResidualBlock(dims, width, width, condition_dim)
        self.middle_attention = SelfAttention(dims, width)
        self.middle_2 = ResidualBlock(dims, width, width, condition_dim)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Map images (B, inputs, *S) to features (B, width, *S/2^(levels-1)) and the skips, finest first."""
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

    def __init__(
        self,
        dims: int,
        outputs: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        condition_dim: int | None,
        skips: bool = True,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        from_below = [widths[0]]
        for depth, width in enumerate(widths):
            from_below += [width] * (blocks + (depth < len(widths) - 1))
        self.skips = skips
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        width = widths[-1]
        for depth in reversed(range(len(widths))):
            inputs = []
            for _ in range(blocks + 1):
                inputs.append(width + (from_below.pop() if skips else 0))
                width = widths[depth]
            attention = depth == len(widths) - 1
            self.levels.append(Level(dims, inputs, width, attention=attention, condition_dim=condition_dim))
            self.ups.append(convolution(dims, width, width) if depth else nn.Identity())
        self.norm = group_norm(width)
        self.out = convolution(dims, width, outputs)

    def forward(self, x: Tensor, skips: list[Tensor], c: Tensor | None = None) -> Tensor:
        """Map deep features and skips to images (B, outputs, *S)."""
        skips = list(skips)
        for depth, (level, up) in enumerate(zip(self.levels, self.ups, strict=True)):
            for block, attention in cast(Level, level).steps():
                if self.skips:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = attention(block(x, c))
            if depth < len(self.levels) - 1:
                x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return cast(Tensor, self.out(F.silu(self.norm(x))))
