"""Where the head is in a study's volumes, and the linear map of each volume's intensities to [0, 1]."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from crossmr.data.volume import Volume
from crossmr.errors import StudyError

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Item = TypeVar("Item")
Result = TypeVar("Result")

LOWEST, HIGHEST = -5.0, 10.0
"""The intensity scale reaches from here to here, in robust standard deviations about the head's median."""
STD_OF_HEAD = 1 / (HIGHEST - LOWEST)
MEDIAN_OF_HEAD = -LOWEST * STD_OF_HEAD
"""Robust standard deviation and median within the head, of every volume, on the [0, 1] scale."""
DARKEST = 2.0**-10
"""What the darkest voxels of the head saturate to: exactly 0 is where nothing was acquired, or was masked."""
RIM_MM = 6.0
"""Skull and scalp are thicker than this, and brains by two methods of stripping differ by less."""
LACKS = 0.05
"""Of the head: where a volume shows so much less of it than others, the rest of it was not acquired."""
BEYOND = 0.5
"""Voxels: what lies farther outside the convex hull of a volume's voxels lies beyond its field of view."""
SMALLEST_SIDE, THINNEST = 8, 3
"""Voxels; a volume with a shorter side than the first in two directions is no scan of a head, and with one shorter than
the second none at all."""


@dataclass(frozen=True)
class Normalisation:
    """The linear map of one volume's intensities to [0, 1]: `low` → 0, `high` → 1.

    Within the head 1/3 is the median, and 1/15 one robust standard deviation, the range of the quartiles / 1.349 (Huber
    1981): neither depends on the lesion, on fat or on air in the sinuses, as mean, deviation and high percentiles do.
    """

    low: float
    """LOWEST robust standard deviations from the median, LOWEST being negative."""
    high: float
    """HIGHEST robust standard deviations from the median."""
    air: float
    """Intensity of air: the median outside the head, or the head's darkest where that is darker."""

    def apply(self, intensities: Array) -> Array:
        """Map intensities to [DARKEST, 1]; values outside `low`..`high` saturate."""
        return np.clip(self.scale(intensities), np.float32(DARKEST), np.float32(1))

    def scale(self, intensities: Array) -> Array:
        """Map intensities without saturating."""
        return (intensities - np.float32(self.low)) / np.float32(self.high - self.low)

    @property
    def air_level(self) -> float:
        """Where air lies on the scale; below 0 where it is darker than `low`."""
        return (self.air - self.low) / (self.high - self.low)


class Head(NamedTuple):
    """Where the head is in a study's volumes."""

    mask: Mask
    """Bool (Z, Y, X): the union of the volumes' foregrounds, its largest component, filled slice by slice."""
    masked: bool
    """Whether every background is one exact value."""
    stripped: list[str]
    """The volumes without skull, where others have one."""
    parts: dict[str, Mask]
    """Modality → what a volume shows of the head, of those that are stripped, or that lack more than LACKS of it.

    What lacks is masked in a masked volume, and lies beyond the field of view in any other.
    """


def find_head(case: str, volumes: Mapping[str, Volume]) -> Head:
    """Find the head in a study's volumes.

    Raises:
        StudyError: there is no head, or a masked volume has nothing of it.
    """
    shape = next(iter(volumes.values())).data.shape
    if min(shape) < THINNEST:
        raise StudyError(
            f"{case}: its volumes are {'×'.join(map(str, reversed(shape)))}; a side has {min(shape)} of the at least "
            f"{THINNEST} voxels that a volume needs. Give the whole volumes, not single slices."
        )
    foregrounds = in_threads(lambda _, volume: foreground(volume.data), volumes)
    masked_background = all(exact for _, exact in foregrounds.values())
    union = np.logical_or.reduce([mask for mask, _ in foregrounds.values()])
    if union.any():
        box = bounding_box(union, 0)
        union[box] = fill_slices(largest_component(union[box]))
    if union.sum() < SMALLEST_SIDE**3:
        raise StudyError(
            f"{case}: no head was found ({int(union.sum())} voxels above the background) in "
            f"{', '.join(volumes)}. Look at the volumes, and export them again or leave this study out."
        )
    for modality, (mask, exact) in foregrounds.items():
        if exact and not (mask & union).any():
            raise StudyError(
                f"{case}: {modality} shows nothing where the other volumes show the head: it lies beside it. "
                "Register it to them, export it again, or leave it out."
            )
    stripped = without_skull(foregrounds, next(iter(volumes.values())).spacing_mm)
    parts = {}
    for modality, (mask, exact) in foregrounds.items():
        data, alone = volumes[modality].data, modality in stripped
        if not exact:
            part = within_field_of_view(data, union)
        elif alone or _lacks(data, union, mask) > LACKS:  # with its holes: quick to see
            part = fill_slices(mask) & union
        else:
            continue
        if alone or _lacks(data, union, part) > LACKS:
            parts[modality] = part
    return Head(union, masked_background, stripped, parts)


def within_field_of_view(data: Array, head: Mask) -> Mask:
    """What of a head (Z, Y, X) lies in the field of view of a volume that was resampled from another grid.

    Beyond it is one value, the commonest of the border. A field of view is convex: what has this value within the
    convex hull of all other voxels is dark, what has it outside was not acquired. The head itself comes back where so
    little of it has this value that LACKS does not matter.
    """
    values, counts = np.unique(_border(data), return_counts=True)
    other = data != values[counts.argmax()]
    suspects = np.argwhere(head & ~other)
    if len(suspects) <= LACKS * head.sum() or not other.any():
        return head
    rows = np.argwhere(other.any(2))
    along = other[tuple(rows.T)]
    ends = along.argmax(1), along.shape[1] - 1 - along[:, ::-1].argmax(1)
    try:
        hull = ConvexHull(np.concatenate([np.column_stack([rows, end]) for end in ends]))
    except QhullError:  # they lie in one plane
        return head
    planes = np.unique(hull.equations.astype(np.float32).round(3), axis=0)
    beyond = np.zeros(len(suspects), bool)
    for some in np.array_split(planes, math.ceil(len(planes) / 16)):
        left = np.flatnonzero(~beyond)
        beyond[left] = (suspects[left].astype(np.float32) @ some[:, :3].T + some[:, 3] > BEYOND).any(1)
    seen = head.copy()
    seen[tuple(suspects[beyond].T)] = False
    return seen


def was_acquired(plane: Array) -> bool:
    """Whether an axial slice (Y, X) holds more than one value; else it lies beyond the field of view."""
    return bool((plane != plane[0, 0]).any())


def acquired(data: Array, mask: Mask) -> Mask:
    """A mask (Z, Y, X) without the axial slices of a volume that were not acquired."""
    there = [was_acquired(plane) for plane in data]
    if all(there) or not mask[there].any():
        return mask
    result = mask.copy()
    result[~np.array(there)] = False
    return result


def _lacks(data: Array, head: Mask, part: Mask) -> float:
    """Fraction of the head, in slices that were acquired, that a volume does not show."""
    inside = acquired(data, head)
    return 1 - float((part & inside).sum() / inside.sum())


def without_skull(foregrounds: Mapping[str, tuple[Mask, bool]], spacing_mm: tuple[float, float, float]) -> list[str]:
    """The volumes that lack the skull of the largest one: masked, and in most axial slices a rim smaller.

    `foregrounds` is modality → what `foreground` gave.
    """
    _, y, x = spacing_mm
    radii = {m: np.sqrt(mask.sum((1, 2)) * (y * x / np.pi)) for m, (mask, _) in foregrounds.items()}  # mm, of discs
    largest = max(radii.values(), key=lambda radius: float((radius**2).sum()))
    found = []
    for modality, radius in radii.items():
        both = (radius > 0) & (largest > 0)
        if foregrounds[modality][1] and both.any() and np.median((largest - radius)[both]) > RIM_MM:
            found.append(modality)
    return found


def foreground(data: Array) -> tuple[Mask, bool]:
    """Find the head in one volume (Z, Y, X), and tell whether its background is one exact value.

    Where the border of a volume is one exact value (skull-stripped, or masked), all other voxels are the head, unless
    many of them are air: then, as in any other volume, Otsu's threshold separates tissue from air.
    """
    tissue = data > otsu_threshold(data)
    if tissue.any():
        box = bounding_box(tissue, 0)  # faster; no step below adds a voxel outside it
        opened = ndimage.binary_opening(tissue[box])
        closed = ndimage.binary_closing(np.pad(opened, 3), iterations=3)[3:-3, 3:-3, 3:-3]
        tissue = np.zeros_like(tissue)
        tissue[box] = fill_slices(largest_component(closed))
    different = data != data[0, 0, 0]
    if (_border(data) == data[0, 0, 0]).mean() >= 0.95 and (different & ~tissue).sum() < 0.25 * different.sum():
        return different, True
    return tissue, False


def _border(data: Array) -> Array:
    """The voxels (N,) of a volume's six faces."""
    faces = [data[0], data[-1], data[:, 0], data[:, -1], data[:, :, 0], data[:, :, -1]]
    return np.concatenate([face.ravel() for face in faces])


def bounding_box(mask: Mask, margin: int) -> Box:
    """The smallest box around a mask (Z, Y, X), `margin` voxels wider on every side where the volume allows."""
    inside = [np.flatnonzero(mask.any(others)) for others in ((1, 2), (0, 2), (0, 1))]
    z, y, x = (
        slice(max(0, int(indices[0]) - margin), min(n, int(indices[-1]) + 1 + margin))
        for indices, n in zip(inside, mask.shape, strict=True)
    )
    return z, y, x


def largest_component(mask: Mask) -> Mask:
    """The largest connected component of a mask; faces connect."""
    components, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.zeros(count + 1, np.int64)
    for plane in components:  # of all at once, it would copy them
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest: Mask = components == sizes.argmax()
    return largest


def fill_slices(mask: Mask) -> Mask:
    """Fill the holes of every axial slice of a mask (Z, Y, X)."""
    filled: Mask = ndimage.binary_fill_holes(mask, ndimage.generate_binary_structure(2, 1)[None])
    return filled


def otsu_threshold(data: Array) -> float:
    """Half-way from the darkest voxels to Otsu's threshold (1979), so that dark tissue is not taken for air."""
    low, high = (float(p) for p in np.percentile(data, (0.5, 98)))
    top = high if high > low else float(data.max())
    narrow = top - low < 1024 * np.spacing(np.float32(max(abs(low), abs(top))))  # float32 has no 256 bins there
    counts, edges = np.histogram(data.astype(np.float64) if narrow else data, bins=256, range=(low, top))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(float)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sum_below / below - (sum_below[-1] - sum_below) / above) ** 2
    best = int(np.nan_to_num(between).argmax())  # nan where one side is empty
    return float(low + (centres[best] - low) / 2)


def fit_normalisation(data: Array, mask: Mask) -> Normalisation:
    """Choose the intensities that become 0 and 1, from the voxels inside and outside the head that were acquired."""
    mask = acquired(data, mask)
    inside = data[mask]
    deviation = float(inside.std())  # before the values are sorted in place: of them all, there is one copy at a time
    quantiles = np.percentile(inside, (0.5, 5, 25, 50, 75, 95), overwrite_input=True)
    floor, q5, q25, median, q75, q95 = (float(p) for p in quantiles)
    spreads = (q75 - q25) / 1.349, (q95 - q5) / 3.29, deviation  # of a normal distribution, all the same
    spread = next((value for value in spreads if value > 0), 1.0)  # few grey levels may have no quartile range
    del inside
    outside = data[~mask]
    air = min(floor, float(np.median(outside, overwrite_input=True)) if outside.size else floor)
    return Normalisation(low=median + LOWEST * spread, high=median + HIGHEST * spread, air=air)


def in_threads(function: Callable[[str, Item], Result], items: Mapping[str, Item]) -> dict[str, Result]:
    """Call a function for every key and item in parallel: NumPy, SciPy and zlib release the interpreter's lock."""
    with ThreadPoolExecutor(max(1, len(items))) as pool:
        return dict(zip(items, pool.map(function, items, items.values()), strict=True))
