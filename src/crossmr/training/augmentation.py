"""What other scanners and other heads do to an image.

As another scanner might, the sources of training samples are changed at random, their targets never; these transforms
are MONAI's. As heads differ in pose and size, whole samples are rotated and stretched, sources, targets and lesion
alike. What is drawn follows from a generator alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossmr.data.head import DARKEST
from crossmr.errors import ConfigError


@dataclass(frozen=True)
class AugmentationConfig:
    """How much a source may change; to one that does, each change below is applied with probability 1/2."""

    probability: float = 0.0
    """Of a source of a sample to be changed at all; 0: none."""
    gamma: float = 1.6
    """Largest exponent of the intensities, and the reciprocal of the smallest."""
    scale: float = 0.05
    """Largest fraction by which all intensities grow or shrink when all else is done."""
    bias_field: float = 0.3
    """Largest coefficient of the cubic polynomial whose exponential multiplies the image."""
    noise: float = 0.05
    """Largest standard deviation of the Rician noise, on the [0, 1] scale."""
    zoom: float = 0.4
    """Smallest fraction of its resolution that an image keeps."""
    shift: float = 1.5
    """Largest misregistration along each axis, in voxels."""
    angle: float = 0.03
    """Largest misregistration about each axis, in radians."""
    deformation: float = 0.0
    """Probability of a sample to be rotated in the plane of its slices and stretched, as a whole; 0: none."""
    rotation: float = 0.25
    """Largest angle of that rotation, in radians."""
    stretch: float = 1.2
    """Largest factor by which each axis grows, and the reciprocal of the smallest."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or not 0 < self.zoom <= 1 or self.gamma < 1 or not 0 <= self.scale < 1:
            raise ConfigError("augmentation: probability and scale lie in [0, 1], zoom in (0, 1]; gamma is 1 or more.")
        if not 0 <= self.deformation <= 1 or self.stretch < 1 or self.rotation < 0:
            raise ConfigError("augmentation: deformation lies in [0, 1]; stretch is 1 or more, rotation not negative.")
        if min(self.bias_field, self.noise, self.shift, self.angle) < 0:
            raise ConfigError("augmentation: bias_field, noise, shift and angle are not negative.")


class Augmentation:
    """Changes one image, (C, *S) in [0, 1], all of its C channels alike."""

    def __init__(self, config: AugmentationConfig, dims: int):
        from monai import transforms as monai

        p, low, self.probability = 0.5, 1 / config.gamma, config.probability
        # each transform is imported and built for this number of axes: MONAI's defaults are for volumes
        self.move: Any = monai.RandAffine(
            p,
            rotate_range=[config.angle] * (1 if dims == 2 else 3),
            translate_range=[config.shift] * dims,
            mode="bilinear",
            padding_mode="zeros",
        )
        self.transform: Any = monai.Compose(
            [
                monai.RandSimulateLowResolution(
                    p,
                    downsample_mode="area",
                    upsample_mode="bilinear" if dims == 2 else "trilinear",
                    zoom_range=(config.zoom, 1.0),
                ),
                monai.RandBiasField(coeff_range=(-config.bias_field, config.bias_field), prob=p),
                monai.RandAdjustContrast(p, gamma=(low, config.gamma)),
                monai.RandRicianNoise(p, std=config.noise, sample_std=True),
            ]
        )
        self.jitter: Any = monai.RandScaleIntensity(config.scale, p)

    def draw(self, generator: torch.Generator) -> tuple[int, float]:
        """All that is random about one image: a seed, and a coin in [0, 1) that says whether it is changed at all."""
        return int(torch.randint(2**31, (1,), generator=generator)), float(torch.rand(1, generator=generator))

    def change(self, image: Tensor, seed: int, coin: float) -> Tensor:
        """The image as another scanner might have given it, in [0, 1]; what is exactly 0 stays 0, but for its edge.

        Its mean and standard deviation within the head come back before the jitter: volumes are standardised.
        """
        if coin >= self.probability or not image.any():
            return image
        self.move.set_random_state(seed=seed)
        self.transform.set_random_state(seed=seed)
        self.jitter.set_random_state(seed=seed + 1)  # its coin is another than the move's
        with torch.autocast(image.device.type, enabled=False):  # MONAI's affines know no bfloat16
            moved = _plain(self.move(image))
            changed = _plain(self.transform(moved))
            head = moved > DARKEST / 2  # not where the interpolation leaves next to nothing; outside there is no noise
            if head.any():
                before, after = moved[head], changed[head]
                gain = before.std(correction=0) / after.std(correction=0).clamp(min=1e-6)
                changed = (changed - after.mean()) * gain + before.mean()
            changed = _plain(self.jitter(changed))
        return changed.clamp(DARKEST, 1) * head


def draw_deformations(config: AugmentationConfig, samples: int, dims: int, generator: torch.Generator) -> Tensor:
    """For each sample an angle in radians and a factor per axis, last axis first, (samples, 1 + dims); else 0 and 1."""
    drawn = torch.rand(samples, 2 + dims, generator=generator)
    coins, sides = drawn[:, :1], 2 * drawn[:, 1:] - 1  # in [-1, 1)
    chosen = torch.cat([sides[:, :1] * config.rotation, (sides[:, 1:] * math.log(config.stretch)).exp()], 1)
    same = torch.tensor([0.0] + [1.0] * dims)
    return torch.where(coins < config.deformation, chosen, same)


def deform(sample: Tensor, deformation: Sequence[float], spacing_mm: Sequence[float]) -> Tensor:
    """Rotate a sample (..., *S) about its middle, in the plane of its last two axes, and stretch all; 0 comes in.

    `spacing_mm` is of the axes *S.

    The last entry of the first axis holds labels, the others images in [0, 1]. Where an image is exactly 0 it has
    nothing, which is not mixed into what it has: its edge moves, and no voxel is darker for it.
    """
    angle, *factors = deformation
    dims = len(spacing_mm)
    size = sample.shape[-dims:]
    sides = torch.tensor([n * mm for n, mm in zip(size, spacing_mm, strict=True)][::-1])  # X first, as in grid_sample
    turn = torch.eye(dims)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn / torch.tensor(factors)[:, None] * sides[None] / sides[:, None]  # from mm to [-1, 1] and back
    theta = torch.cat([linear, torch.zeros(dims, 1)], 1)[None]
    channels = sample.reshape(1, -1, *size)
    grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
    there = F.grid_sample((channels > 0).float(), grid, align_corners=False)
    images = F.grid_sample(channels, grid, align_corners=False) / there.clamp(min=0.5)
    moved = torch.where(there >= 0.5, images.clamp(max=1), 0).reshape(sample.shape)
    labels = sample[-1].reshape(1, -1, *size)
    moved[-1] = F.grid_sample(labels, grid, mode="nearest", align_corners=False).reshape(sample.shape[1:])
    return moved


def _plain(image: Any) -> Tensor:
    """A tensor without MONAI's metadata."""
    return torch.as_tensor(getattr(image, "as_tensor", lambda: image)())
