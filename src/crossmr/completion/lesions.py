"""Bright areas of the acquired scans that may be lesions, and whether the synthetic ones still show them.

Only what a user has is looked at: acquired and synthetic volumes, and the standard deviation. FLAIR is searched, or T2
where there is none; in T2 what is dark in T1, or in T1ce where there is none, is fluid. Volumes are smoothed and
thinned to 2 mm; the rim of the head, where skull, scalp and partial volumes lie, is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crossmr.completion.checks import Finding
from crossmr.data.naming import display_name

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Voxel = tuple[int, int, int]

GRID_MM, SMOOTH_MM = 2.0, 1.5
"""Distance of the voxels that are looked at, and the Gaussian that volumes are smoothed with before."""
RIM_MM = {True: 8.0, False: 22.0}
"""Left out at the rim of each axial slice, of brains without skull and of heads."""
BRIGHT, FLUID = 2.0, 1.5
"""Robust standard deviations above the median of FLAIR or T2 from which on a voxel is bright, and below that of T1
or T1ce from which on it is fluid."""
LEAST_ML = 2.0
"""A smaller bright area is none."""
USUAL = {("t2f", "t2w"): 0.6, ("t2w", "t2f"): 1.2}
"""(acquired, synthetic) → the contrast of a lesion in the second for 1 in the first, in quartile ranges of the rest."""
LOST = 0.5
"""Of the usual contrast: with less a lesion is lost."""


@dataclass(frozen=True, eq=False)
class Bright:
    """The largest bright area of an acquired volume."""

    modality: str
    ml: float
    contrast: float
    """Mean above the median of the rest, in quartile ranges of the rest."""
    area: Mask
    """On the thinned grid."""
    at: Voxel
    """A voxel in its middle, on the volumes' own grid."""


@dataclass(frozen=True, eq=False)
class _Thinned:
    """A head on a coarser grid."""

    steps: Voxel
    sides: tuple[float, float, float]
    head: Mask
    weight: Array
    """The head, smoothed, on the volumes' own grid."""
    deep: Mask
    """Without the rim."""

    @classmethod
    def of(cls, head: Mask, spacing_mm: Sequence[float], *, stripped: bool) -> "_Thinned":
        z, y, x = (max(1, round(GRID_MM / side)) for side in spacing_mm)
        sides = (spacing_mm[0] * z, spacing_mm[1] * y, spacing_mm[2] * x)
        coarse = head[::z, ::y, ::x]
        padded = np.pad(coarse, ((0, 0), (1, 1), (1, 1)))  # where the field of view ends, the head does
        deep = [ndimage.distance_transform_edt(p, sides[1:])[1:-1, 1:-1] >= RIM_MM[stripped] for p in padded]
        weight = np.maximum(_smooth(head.astype(np.float32), spacing_mm), 1e-3).astype(np.float32)
        return cls((z, y, x), sides, coarse, weight, np.stack(deep))

    def thin(self, volume: Array, head: Mask, spacing_mm: Sequence[float]) -> Array:
        """A volume smoothed within the head, on the coarser grid."""
        z, y, x = self.steps
        masked: Array = np.where(head, volume, np.float32(0))
        smooth: Array = _smooth(masked, spacing_mm) / self.weight
        return smooth[::z, ::y, ::x]


def _smooth(volume: Array, spacing_mm: Sequence[float]) -> Array:
    smooth: Array = ndimage.gaussian_filter(volume, [SMOOTH_MM / side for side in spacing_mm])
    return smooth


def find_lesions(
    acquired: Mapping[str, Array],
    head: Mask,
    spacing_mm: Sequence[float],
    synthetic: Mapping[str, Array],
    *,
    stripped: bool,
) -> tuple[list[Finding], Voxel | None]:
    """What the synthetic volumes may have lost, and a voxel in the middle of the brightest lost or largest bright area.

    Args:
        acquired: modality → volume (Z, Y, X) in [0, 1], 0 outside the head.
        head: bool (Z, Y, X).
        spacing_mm: of (Z, Y, X).
        synthetic: as `acquired`.
        stripped: whether the head is a brain without skull.
    """
    targets = [m for m in ("t1c", "t2w", "t2f") if m in synthetic]
    source = next((m for m in ("t2f", "t2w") if m in acquired), None)
    if source is None or (source == "t2w" and _shows_fluid(acquired) is None):
        return ([_unchecked(source, tuple(targets))] if targets else []), None
    thinned = _Thinned.of(head, spacing_mm, stripped=stripped)
    bright = _brightest(source, acquired, thinned, head, spacing_mm)
    if bright is None:
        return [], None
    found = []
    for target in targets:
        if target == "t1c":
            found.append(_enhancement(bright))
        else:
            volume = thinned.thin(synthetic[target], head, spacing_mm)
            if _contrast(volume, bright.area, thinned.deep) < LOST * USUAL[source, target] * bright.contrast:
                found.append(_lost(bright, target))
    return found, bright.at


def _shows_fluid(acquired: Mapping[str, Array]) -> str | None:
    """The contrast in which fluid is dark; None where there is none."""
    return next((m for m in ("t1n", "t1c") if m in acquired), None)


def _brightest(
    source: str, acquired: Mapping[str, Array], thinned: _Thinned, head: Mask, spacing_mm: Sequence[float]
) -> Bright | None:
    """The largest bright area of a volume that is no fluid."""
    volume, searched = thinned.thin(acquired[source], head, spacing_mm), thinned.deep
    if source == "t2w" and (name := _shows_fluid(acquired)) is not None:  # which is bright, too
        dark = thinned.thin(acquired[name], head, spacing_mm)
        searched = searched & (dark > _above_median(dark, searched, -FLUID))
    if not searched.any():
        return None
    bright = ndimage.binary_opening((volume > _above_median(volume, searched, BRIGHT)) & searched)
    labels, count = ndimage.label(bright)
    if not count:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    area = labels == sizes.argmax() + 1
    ml = float(sizes.max() * np.prod(thinned.sides) / 1000)
    if ml < LEAST_ML:
        return None
    z, y, x = (int(i) * step for i, step in zip(_middle(area), thinned.steps, strict=True))
    return Bright(source, ml, _contrast(volume, area, thinned.deep), area, (z, y, x))


def _above_median(volume: Array, within: Mask, deviations: float) -> float:
    """So many robust standard deviations above the median."""
    if not within.any():
        return 0.0
    q25, median, q75 = np.percentile(volume[within], (25, 50, 75))
    return float(median + deviations * (q75 - q25) / 1.349)


def _contrast(volume: Array, area: Mask, deep: Mask) -> float:
    """How far an area is above the median of the rest, in quartile ranges of the rest; 0 where that is constant."""
    rest = deep & ~ndimage.binary_dilation(area, iterations=2)
    if not rest.any():
        return 0.0
    q25, median, q75 = np.percentile(volume[rest], (25, 50, 75))
    return float((volume[area].mean() - median) / (q75 - q25)) if q75 > q25 else 0.0


def _middle(area: Mask) -> Voxel:
    """The voxel of an area that lies deepest in it."""
    z, y, x = np.unravel_index(int(ndimage.distance_transform_edt(np.pad(area, 1)).argmax()), np.add(area.shape, 2))
    return int(z) - 1, int(y) - 1, int(x) - 1


def _lost(bright: Bright, target: str) -> Finding:
    source, made = display_name(bright.modality), display_name(target)
    words = f"{source} has a bright area of {bright.ml:.0f} ml, perhaps a lesion, that the synthetic {made} has lost."
    return Finding("lost lesion", "look", words, (target,))


def _enhancement(bright: Bright) -> Finding:
    source = display_name(bright.modality)
    words = (
        f"{source} has a bright area of {bright.ml:.0f} ml, perhaps a lesion. Whether it enhances cannot be seen in a "
        "synthetic T1ce, which mostly loses enhancement."
    )
    return Finding("lost enhancement", "look", words, ("t1c",))


def _unchecked(source: str | None, targets: tuple[str, ...]) -> Finding:
    why = "Neither T2 nor FLAIR was acquired"
    if source is not None:
        why = "T2 was acquired without FLAIR, T1 and T1ce, and alone does not tell lesions from fluid"
    words = f"{why}: lesions may be lost, and nothing shows where they were."
    return Finding("unchecked lesions", "look", words, targets)


def most_uncertain(std: Array, head: Mask, spacing_mm: Sequence[float], *, stripped: bool) -> Voxel | None:
    """The voxel (Z, Y, X) where the smoothed standard deviation is largest, away from the head's rim and ends."""
    thinned = _Thinned.of(head, spacing_mm, stripped=stripped)
    ends = round(RIM_MM[stripped] / thinned.sides[0])  # slices at either end of the head
    deep = ndimage.minimum_filter1d(thinned.deep, 2 * ends + 1, axis=0, mode="constant", cval=0)
    if not deep.any():
        return None
    smooth = np.where(deep, thinned.thin(std, head, spacing_mm), np.float32(0))
    place = np.unravel_index(int(smooth.argmax()), smooth.shape)
    z, y, x = (int(i) * step for i, step in zip(place, thinned.steps, strict=True))
    return z, y, x
