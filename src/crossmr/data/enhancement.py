"""Which of two T1-weighted volumes of one patient was acquired with contrast agent, by the volumes alone.

Vessels, dural sinuses and choroid plexus are bright after the agent, whatever the disease. So within the brain there
are voxels that one volume shows much brighter than its other voxels of the same intensity in the other volume, and few
the other way round. Measured on real scans (docs/checks.md).
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crossmr.data.formats import stem_of
from crossmr.data.head import Array, Mask, bounding_box, fill_slices, foreground, largest_component
from crossmr.data.naming import StudyFiles, in_usual_order
from crossmr.data.volume import Volume, read_volume
from crossmr.data.words import possible_contrasts
from crossmr.errors import VolumeError

Floats = npt.NDArray[np.float64]

GRID_MM = 2.0
"""What finer volumes are thinned to."""
BRAIN_MM = 80.0
"""Of a head with skull, what is looked at: so much below its top lies nothing but brain within the skull."""
DEEP_MM, SKULL_MM = 28.0, 18.0
"""How far from a head's rim, within slices, there is mostly brain, and how far from it there is skull and scalp."""
STRIPPED_MM, INSIDE_MM = 6.0, 6.0
"""How much of a brain's rim is not looked at, of a stripped one and of one that was found within a skull."""
TISSUE = 0.6, 1.7
"""Brain has so many times its median, in a T1 with contrast agent or without; bone has less, fat more."""
BIAS_MM = 20.0
"""Intensities are divided by their mean within about so far: the coil's field."""
LEVELS = 24
"""Of equally many voxels each: intensities of one volume, at which the other's are compared."""
BRIGHTEST = 99.0
"""Percentile of the voxels by which vessels are judged."""
LEAST_NOISE = 0.001
"""Of the brain's median: what spreads less counts as spread so much."""
LEAST_AREA = 0.4
"""Of a head with skull, slices of less area than this fraction of the largest hold more scalp than brain."""
FLUID = 15.0
"""Percentile of a T1's brain below which there is mostly fluid."""
FEWEST_VOXELS, LEAST_CM3 = 2_000, 100.0
"""Of brain; in less, nothing is compared."""
THRESHOLD = 0.5
"""Score from which on a volume is taken for the enhanced one."""
RELATED, SAME = 0.05, 0.98
"""Correlations within the brain: below, two volumes are not of one contrast, and above, they are one image."""

WITHIN = 0.99
"""Of a thinned voxel: so much must lie within the head."""
MAX_COMPARED = 6
"""So many T1 of a study are compared."""
SURENESS = "by a test that was sure of 122 of 133 patients, and right about all of these"
"""For messages; docs/checks.md has the table."""


@dataclass(frozen=True)
class Comparison:
    """What two volumes say of contrast agent."""

    score: float
    """How many times farther the second's bright voxels stand out of the first than the other way round: logarithm."""
    correlation: float
    """Of the two volumes within the brain, or within what of it is brighter than fluid, whichever is lower."""

    @property
    def enhanced(self) -> Literal["first", "second", "neither"]:
        """Which was acquired with contrast agent, for sure; "neither" where nobody can tell."""
        return self.at(THRESHOLD)

    def at(self, limit: float) -> Literal["first", "second", "neither"]:
        """As `enhanced`, at another threshold than `THRESHOLD`."""
        if not RELATED <= self.correlation <= SAME or abs(self.score) < limit:
            return "neither"
        return "second" if self.score > 0 else "first"


UNKNOWN = Comparison(0.0, 0.0)


class Pair(NamedTuple):
    """Two volumes on one grid."""

    first: Array
    second: Array
    head: Mask
    """What both show of the head, or of the brain where one of them is stripped."""
    spacing_mm: tuple[float, float, float]
    stripped: bool


def compare(first: Volume, second: Volume) -> Comparison:
    """Compare two T1 of one patient where their headers say that they lie, at the resolution that both have."""
    return compare_arrays(*together(first, second))


def together(first: Volume, second: Volume) -> Pair:
    """Two volumes on a grid along the first's axes, no finer than either nor than `GRID_MM`."""
    affine, shape = common_grid(first, second)
    volumes, masks, stripped = [], [], False
    for volume in (first, second):
        data = volume.data
        if not (finite := np.isfinite(data)).all():
            data = np.where(finite, data, np.min(data, initial=0, where=finite))
        mask, exact = foreground(data)
        volumes.append(resampled(volume, data, affine, shape))
        masks.append(resampled(volume, mask.astype(np.float32), affine, shape) > WITHIN)
        stripped |= exact
    x, y, z = (float(side) for side in np.linalg.norm(affine[:3, :3], axis=0))
    return Pair(volumes[0], volumes[1], masks[0] & masks[1], (z, y, x), stripped)


def compare_arrays(
    first: Array, second: Array, head: Mask, spacing_mm: tuple[float, float, float], stripped: bool
) -> Comparison:
    """Compare two T1 (Z, Y, X) on one grid within a head, which is a brain where `stripped`."""
    if not head.any():
        return UNKNOWN
    box = bounding_box(head, 0)
    head = head[box]
    first, second = (_above_air(volume[box], head) for volume in (first, second))
    brain = _rim_off(head, STRIPPED_MM, spacing_mm) if stripped else within_skull(first, second, head, spacing_mm)
    if brain.sum() < FEWEST_VOXELS or brain.sum() * np.prod(spacing_mm) < LEAST_CM3 * 1000:
        return UNKNOWN
    box = bounding_box(brain, 0)
    a, b = (_even(volume[box], brain[box], spacing_mm) for volume in (first, second))
    standing_out = np.log(_outstanding(b, a) / _outstanding(a, b))
    darkest, median, brightest = np.percentile(b - a, (100 - BRIGHTEST, 50, BRIGHTEST))
    skewed = (brightest + darkest - 2 * median) / max(float(brightest - darkest), 1e-6)
    brighter = (a > np.percentile(a, FLUID)) & (b > np.percentile(b, FLUID))  # there, FLAIR is reversed
    return Comparison(float(standing_out + skewed / 2), min(_correlation(a, b), _correlation(a[brighter], b[brighter])))


def doubtful_files(files: StudyFiles) -> list[Path]:
    """The T1 of a study that has several, and no T1ce, by their names; [] of any other.

    Files that were passed over, or whose names say too little, count, unless a word says that they are copies.
    """
    others = [
        path
        for path in (*files.passed_over, *files.unrecognised)
        if possible_contrasts(stem_of(path.name).removeprefix(files.case)) == {"t1n", "t1c"}
    ]
    paths = [*files.candidates.get("t1n", ()), *others]
    return paths if len(paths) > 1 and "t1c" not in files.candidates else []


def tell_apart(files: StudyFiles) -> StudyFiles:
    """A study with one of its `doubtful_files` as T1ce, where the voxels are sure which.

    It must be enhanced beside the T1, and none of the others may be beside any.
    """
    paths = doubtful_files(files)[:MAX_COMPARED]
    try:
        volumes = [read_volume(path) for path in paths]
    except VolumeError:  # which is said when the study is read
        return files
    enhanced, plain = set[Path](), set[Path]()
    for i, k in itertools.combinations(range(len(paths)), 2):
        answer = compare(volumes[i], volumes[k]).enhanced
        if answer != "neither":
            enhanced.add(paths[i] if answer == "first" else paths[k])
            plain.add(paths[k] if answer == "first" else paths[i])
    by_name = [path for path in files.candidates.get("t1n", ()) if path in plain]
    t1n = by_name or [path for path in paths if path in plain]
    if len(enhanced) != 1 or len(t1n) != 1 or enhanced & plain:
        return files
    (t1c,) = enhanced
    found: dict[str, tuple[Path, ...]] = {**files.candidates, "t1n": (t1n[0],), "t1c": (t1c,)}
    note = f"{t1c.name} was taken for T1ce: vessels brighter than in {t1n[0].name}, {SURENESS}. "
    note += f"If that is wrong, name it with --map t1n='*{t1c.name.removeprefix(files.case)}'."
    return replace(
        files,
        candidates={m: found[m] for m in in_usual_order(found)},
        unrecognised=tuple(path for path in files.unrecognised if path not in (t1n[0], t1c)),
        passed_over=tuple(sorted({*files.candidates.get("t1n", ()), *files.passed_over} - {t1n[0], t1c})),
        notes=(*files.notes, note),
    )


def compare_within(
    first: Array, second: Array, head: Mask, spacing_mm: tuple[float, float, float], stripped: bool
) -> Comparison:
    """As `compare_arrays`, of arrays that are finer than need be."""
    thin, sides = _thinned(first, spacing_mm)
    within = _thinned(head, spacing_mm)[0] > WITHIN
    return compare_arrays(thin, _thinned(second, spacing_mm)[0], within, sides, stripped)


def within_skull(first: Array, second: Array, head: Mask, spacing_mm: tuple[float, float, float]) -> Mask:
    """Roughly the upper part of the brain, in two T1 (Z, Y, X) of a head with skull."""
    z, y, x = spacing_mm
    upper = np.flatnonzero(head.sum((1, 2)) > 0.02 * head.sum((1, 2)).max())
    tissue = head.copy()
    tissue[: max(0, int(upper[-1] - BRAIN_MM / z))] = False
    tissue[head.sum((1, 2)) < LEAST_AREA * head.sum((1, 2)).max()] = False
    middle = _rim_off(head, DEEP_MM, spacing_mm) & tissue
    for volume in (first, second):
        median = np.median(volume[middle if middle.any() else tissue])
        smooth = ndimage.gaussian_filter(volume, (0, 1 / y, 1 / x))
        tissue &= (smooth > TISSUE[0] * median) & (smooth < TISSUE[1] * median)
    disc = _disc(4, spacing_mm)
    apart = ndimage.binary_erosion(tissue, disc)  # from the scalp, beyond the bone
    brain = ndimage.binary_dilation(largest_component(apart), disc) & tissue
    disc, pad = _disc(12, spacing_mm), int(12 / min(y, x)) + 2  # sulci, sinuses and bright vessels belong to it
    closed = ndimage.binary_closing(np.pad(brain, ((0, 0), (pad, pad), (pad, pad))), disc)[:, pad:-pad, pad:-pad]
    eroded: Mask = ndimage.binary_erosion(fill_slices(closed), _disc(INSIDE_MM, spacing_mm))
    return eroded & _rim_off(head, SKULL_MM, spacing_mm)


def _above_air(volume: Array, head: Mask) -> Array:
    """A volume that is not negative within the head, but for its very darkest voxels."""
    darkest = min(0.0, float(np.percentile(volume[head], 0.5)))
    return volume - np.float32(darkest) if darkest else volume


def _correlation(a: Floats, b: Floats) -> float:
    """Pearson's; 0 where one is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.size > 1 and a.std() > 0 and b.std() > 0 else 0.0


def _rim_off(mask: Mask, mm: float, spacing_mm: tuple[float, float, float]) -> Mask:
    """A mask without its rim within slices."""
    eroded: Mask = ndimage.binary_erosion(mask, np.ones((1, 3, 3), bool), iterations=max(1, round(mm / spacing_mm[1])))
    return eroded


def _disc(mm: float, spacing_mm: tuple[float, float, float]) -> Mask:
    """A disc within slices, (1, Y, X)."""
    _, y, x = spacing_mm
    rows, columns = np.ogrid[-int(mm / y) : int(mm / y) + 1, -int(mm / x) : int(mm / x) + 1]
    disc: Mask = ((rows * y) ** 2 + (columns * x) ** 2 <= mm**2)[None]
    return disc


def _even(volume: Array, brain: Mask, spacing_mm: tuple[float, float, float]) -> Floats:
    """The brain's voxels, their bias field divided out: about 1."""
    level = float(np.median(volume[brain])) or 1.0
    values = np.where(brain, volume / np.float32(level), 0).astype(np.float32)
    sizes = [max(1, round(1.75 * BIAS_MM / side) | 1) for side in spacing_mm]
    field, weight = values, brain.astype(np.float32)
    for _ in range(2):
        field, weight = ndimage.uniform_filter(field, sizes), ndimage.uniform_filter(weight, sizes)
    even: Floats = (values[brain] / np.maximum(field[brain] / weight[brain], 0.1)).astype(np.float64)
    return even


def _outstanding(values: Floats, given: Floats) -> float:
    """How far the brightest voxels of one volume stand out of what the other's intensities lead to expect.

    In robust standard deviations of what is left when each voxel's `given` intensity is known.
    """
    order = np.argsort(given, kind="stable")
    order = order[: len(order) // LEVELS * LEVELS].reshape(LEVELS, -1)
    expected = np.interp(given, given[order[:, order.shape[1] // 2]], np.median(values[order], axis=1))
    left = values - expected
    low, high, brightest = np.percentile(left, (25, 75, BRIGHTEST))
    return max(float(brightest), 1e-3) / float(np.hypot((high - low) / 1.349, LEAST_NOISE))


def _thinned(array: Array | Mask, spacing_mm: tuple[float, float, float]) -> tuple[Array, tuple[float, float, float]]:
    """An array (Z, Y, X) in blocks of about `GRID_MM`, each its mean, and their sides in mm."""
    steps = [max(1, round(GRID_MM / side)) for side in spacing_mm]
    shape = [n // step for n, step in zip(array.shape, steps, strict=True)]
    whole = array[tuple(slice(n * step) for n, step in zip(shape, steps, strict=True))]
    (z, y, x), (sz, sy, sx) = shape, steps
    blocks: Array = whole.reshape(z, sz, y, sy, x, sx).mean((1, 3, 5), dtype=np.float32)
    return blocks, (spacing_mm[0] * sz, spacing_mm[1] * sy, spacing_mm[2] * sx)


def common_grid(first: Volume, second: Volume) -> tuple[Floats, tuple[int, int, int]]:
    """Affine and shape (Z, Y, X) of a grid along the first's axes, no finer than either volume, nor than `GRID_MM`."""
    axes = first.affine[:3, :3] / np.linalg.norm(first.affine[:3, :3], axis=0)
    own = np.linalg.norm(first.affine[:3, :3], axis=0)
    sides = np.maximum(np.maximum(GRID_MM, own), np.abs(axes.T @ second.affine[:3, :3]).max(1))
    counts = np.maximum(1, np.floor(np.array(first.data.shape[::-1]) * own / sides)).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = axes * sides
    affine[:3, 3] = first.affine[:3, 3] + axes @ ((sides - own) / 2)
    x, y, z = (int(n) for n in counts)
    return affine, (z, y, x)


def resampled(volume: Volume, data: Array, affine: Floats, shape: tuple[int, int, int]) -> Array:
    """A volume's voxels, blurred to another grid's resolution, on that grid; their darkest value beyond them."""
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    sides = np.linalg.norm(volume.affine[:3, :3], axis=0)
    wanted = np.abs(axes.T @ affine[:3, :3]).max(1)
    sigmas = 0.425 * np.sqrt(np.maximum(wanted**2 - sides**2, 0)) / sides  # voxels; full width at half maximum
    smooth = ndimage.gaussian_filter(data, sigmas[::-1])
    to_voxels = np.linalg.inv(volume.affine) @ affine
    matrix = to_voxels[:3, :3][::-1, ::-1]
    on: Array = ndimage.affine_transform(smooth, matrix, to_voxels[:3, 3][::-1], shape, order=1, cval=float(data.min()))
    return on
