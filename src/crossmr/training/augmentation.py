"""What other scanners do to an image: the sources of training samples are changed at random, their targets never.

The transforms are MONAI's; what is drawn follows from a generator alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or not 0 < self.zoom <= 1 or self.gamma < 1 or not 0 <= self.scale < 1:
            raise ConfigError("augmentation: probability and scale lie in [0, 1], zoom in (0, 1]; gamma is 1 or more.")
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

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """The image, changed by what is drawn."""
        return self.change(image, *self.draw(generator))

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


def _plain(image: Any) -> Tensor:
    """A tensor without MONAI's metadata."""
    return torch.as_tensor(getattr(image, "as_tensor", lambda: image)())
