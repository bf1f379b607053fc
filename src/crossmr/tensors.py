"""Volumes and slices as the networks read them: cropped, padded, stacked; and seeded random generators."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crossmr.files import digest

NEIGHBOURS_MM = 1.0
"""Distance of the neighbouring slices that a network is given."""
PLANES = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 1, 0)}
"""Plane → where its slices, rows and columns lie in (Z, Y, X); turning a volume twice gives it back."""
FOREGROUND_FRACTION = 0.1
"""Training skips slices with less foreground than this fraction of the volume's slice with the most."""


def planes_of(count: int, spacing_mm: float) -> list[str]:
    """The planes in which a volume is cut, whose axial slices lie so far apart: thick slices in no other plane."""
    return [*PLANES][: count if spacing_mm <= 2 * NEIGHBOURS_MM else 1]


def foreground_slices(foreground_voxels: Sequence[int]) -> list[int]:
    """Axial slices with enough foreground to learn from: at least `FOREGROUND_FRACTION` of the largest count."""
    smallest = max(1, FOREGROUND_FRACTION * max(foreground_voxels, default=0))
    return [z for z, voxels in enumerate(foreground_voxels) if voxels >= smallest]


def crop_or_pad(image: Tensor, size: Sequence[int], offset: Sequence[float]) -> Tensor:
    """Crop or zero-pad the last axes of `image` to `size`; `offset` in [0, 1) places a crop, 0.5 central."""
    for axis, (length, position) in enumerate(zip(size, offset, strict=True), start=image.ndim - len(size)):
        excess = image.shape[axis] - length
        if excess > 0:
            image = image.narrow(axis, min(int(position * (excess + 1)), excess), length)
        elif excess < 0:
            before = (1 - excess) // 2  # where the central crop begins, so that it undoes the padding
            padded = image.new_zeros([length if k == axis else side for k, side in enumerate(image.shape)])
            padded.narrow(axis, before, image.shape[axis]).copy_(image)
            image = padded
    return image


def pad_to_multiple(image: Tensor, dims: int, divisor: int) -> Tensor:
    """Zero-pad the last `dims` axes on both sides to multiples of `divisor`; a central `crop_or_pad` undoes it."""
    size = [-(-side // divisor) * divisor for side in image.shape[-dims:]]
    return crop_or_pad(image, size, [0.5] * dims)


def to_model_input(volume: Tensor, slices: Sequence[Sequence[int]], dims: int, divisor: int) -> Tensor:
    """Volumes (M, Z, Y, X) as the networks read them, padded to multiples of `divisor`.

    In 2D a batch of N axial slices, each with its C `neighbours`, (N, M·C, Y, X); in 3D the volumes, (1, M, Z, Y, X).
    """
    if dims == 3:
        return pad_to_multiple(volume[None], dims, divisor)
    planes = torch.tensor(slices)
    images = volume[:, planes].transpose(0, 1).flatten(1, 2)  # (N, M·context, Y, X)
    return pad_to_multiple(images, dims, divisor)


def neighbours(z: int, context: int, slices: int, spacing_mm: float) -> list[int]:
    """The indices of `context` slices around z, a millimetre apart as nearly as slices of this spacing can be.

    So both neighbours at 1 mm are z itself in slices thicker than 2 mm, those at 2 mm in slices thicker than 4 mm.
    Beyond a volume's end its last slice is repeated.
    """
    steps = [math.floor(abs(k) * NEIGHBOURS_MM / spacing_mm + 0.5) * (1 if k > 0 else -1) for k in _around(context)]
    return [min(max(z + step, 0), slices - 1) for step in steps]


def _around(context: int) -> range:
    return range(-(context // 2), context // 2 + 1)


def seeded(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`; crossmr draws every random number from such a generator."""
    number = int(digest("/".join(map(str, key)))[:15], 16)
    return torch.Generator().manual_seed(number)
