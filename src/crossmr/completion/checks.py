"""What may be wrong with a study, in plain words, and how much it matters; measured on real scans (docs/checks.md)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage
from torch import Tensor

from crossmr.baselines import linear_weights, resize, together
from crossmr.data.enhancement import compare_within
from crossmr.data.head import bounding_box
from crossmr.data.naming import display_name
from crossmr.data.study import Study, skull_note
from crossmr.typical import describe, deviations

Array = npt.NDArray[np.float32]
Severity = Literal["note", "look", "refuse"]
"""What follows from a finding: nothing, a look at the images, or that nothing is made from such scans."""
GREYS = 256
"""Grey values of an image of eight bits."""
SATURATED = 0.01
"""Fraction of the head at one brightest value, from which on it is cut off."""
SHIFT_MM, GAIN = 3.0, 1.05
"""A volume lies elsewhere where its edges fit another's so much better when moved so far."""
FAR_MM = 4.0
"""From this distance on nothing is made from volumes that lie apart."""
FARTHEST_MM = 25.0
GRID_MM = 2.0
"""What volumes are thinned to before they are moved about."""
SWAPPED, SURELY_SWAPPED = 0.9, 0.85
"""Of the error of the linear regressions, what is left of it when two contrasts exchange names; the second surely,
without a T2 among them, which tells more than the others."""
MISNAMED = -0.1
"""How much worse T2 and another volume correlate with the mean images of their names than with each other's, in sum."""
VOXELS, ON_GRID = 40_000, 150_000
"""Of the head, from which names are judged; and of a grid of them, by the mean images."""
SAME = 0.995
"""Correlation within the head from which on two volumes are one image."""
SUSPECT = 0.3
"""Score of T1 as the enhanced one, beside T1ce, from which on that is said: lower than what decides without names."""
FARTHEST = 4.5
"""Robust standard deviations from the training's median from which on a volume is noisy or uneven."""
STRANGE_SHAPE, STRANGE_EDGES = 2.5, 2.5
"""The same, of the head's shape (root mean square) and of a volume's edges (mean over the other volumes)."""
UNLIKE = {
    "smooth": "is noisier than the scans that the model was trained on.",
    "even": "is brighter in one region than in others, unlike the scans that the model was trained on: correct its "
    "bias field first.",
}
OTHER_SHAPE = (
    "The head has another shape than those that the model was trained on: it may be cut, turned or upside down, "
    "or its field of view is another."
)
TWO_EDGES = "One of them may be another patient's, turned, moved or blurred."


@dataclass(frozen=True)
class Finding:
    """Something that a check found."""

    kind: str
    """One or two words, the same for all findings of a check."""
    severity: Severity
    words: str
    """A sentence or two, for whoever uses the images."""
    contrasts: tuple[str, ...] = ()
    """The synthetic contrasts that it concerns; none where it concerns all of them."""


def check(
    study: Study,
    baselines: Mapping[str, Tensor],
    modalities: Sequence[str],
    training: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """What is found in a study; `baselines` and `modalities` are the model's (`fit_baselines`), {} where it has none.

    `training` is the record of the model's: what it has 'seen' (`trained_on.count_seen`), and what is 'typical' of it
    (`typical.summarise`).

    Grey values: eight bits, cut off at the top. Geometry: slices of the head that a volume lacks, volumes that are
    shifted against one another. Names: one image under two names, two contrasts that fit better the other way round,
    and vessels that are brighter in T1 than in T1ce.
    """
    box = study.box(0)
    head = study.mask[box]
    volumes = {m: study.normalised(m, box) for m in study.volumes}
    training = training or {}
    found = skull(training.get("seen", {}), stripped=study.masked_background)
    found += [Finding("skull", "look", words) for words in skull_note(study.volumes, study.stripped)]
    for modality, volume in study.volumes.items():
        found += grey_values(modality, volume.data[study.mask_of(modality)])
        found += missing_slices(modality, volumes[modality], study.mask_of(modality)[box])
    voxels, sides = thinning(study.reference.spacing_mm)
    thinned = {m: study.normalisation[m].apply(volume.data[box][voxels]) for m, volume in study.volumes.items()}
    found += shifts(thinned, sides)  # unmasked: the mask's edge is the same in all
    found += same_images(volumes, head)
    found += swaps(volumes, head, baselines, modalities)
    if {"t1n", "t1c"} <= volumes.keys():
        both = study.mask_of("t1n")[box] & study.mask_of("t1c")[box] & (volumes["t1n"] > 0) & (volumes["t1c"] > 0)
        stripped = study.masked_background or not {"t1n", "t1c"}.isdisjoint(study.stripped)
        t1n, t1c = (study.volumes[m].data[box] for m in ("t1n", "t1c"))
        found += unenhanced(t1n, t1c, both, study.reference.spacing_mm, stripped)
    if "typical" in training:
        numbers = describe(volumes, head, study.reference.spacing_mm, baselines, modalities)
        strange = unlike(deviations(numbers, training["typical"], without_skull=study.masked_background))
        if any(one.kind in ("smooth", "shape") for one in strange):  # the regressions were fitted on other images
            found = [replace(one, severity="look") if one.kind == "swapped" else one for one in found]
        found += strange
    return found


def unlike(below: Mapping[str, float]) -> list[Finding]:
    """In what a study is unlike those of the training, from `typical.deviations`."""
    found = []
    for what, words in UNLIKE.items():
        for modality in [name.split()[1] for name, far in below.items() if name.startswith(what) and far > FARTHEST]:
            found.append(Finding(what, "look", f"{display_name(modality)} {words}"))
    if below.get("shape", 0) > STRANGE_SHAPE:
        found.append(Finding("shape", "look", OTHER_SHAPE))
    pairs = {tuple(name.split()[1:]): far for name, far in below.items() if name.startswith("edges")}
    means = {m: float(np.mean([far for pair, far in pairs.items() if m in pair])) for pair in pairs for m in pair}
    if len(means) > 1 and max(means.values()) > STRANGE_EDGES:
        odd = max(means, key=lambda m: means[m])
        name = display_name(odd) if len(means) > 2 else " and ".join(display_name(m) for m in means)
        words = f"{name} shows other edges than the other scans: another patient's, turned, moved or blurred."
        found.append(Finding("edges", "look", words if len(means) > 2 else f"{name} show other edges. {TWO_EDGES}"))
    return found


def skull(seen: Mapping[str, Any], *, stripped: bool) -> list[Finding]:
    """A head where the model has seen brains alone, or the other way round."""
    studies, without = seen.get("studies", 0), seen.get("without_skull", 0)
    if studies and stripped and without == 0:
        words = "The skull is stripped, or the background masked, and the model was trained on whole heads alone."
        return [Finding("skull", "look", words)]
    if studies and not stripped and without == studies:
        words = "The skull is there, and the model was trained on stripped brains alone: strip it first."
        return [Finding("skull", "look", words)]
    return []


def grey_values(modality: str, values: Array) -> list[Finding]:
    """Few grey values, or many voxels at the brightest one."""
    name, found = display_name(modality), []
    some = values[:: max(1, len(values) // VOXELS)]
    if len(np.unique(some)) <= GREYS and len(some) > 8 * GREYS:
        words = f"{name} has eight bits, or as few grey values: fine differences are lost."
        found.append(Finding("grey values", "note", words))
    if (share := float((values == values.max()).mean())) > SATURATED:
        words = f"{name} is cut off: {share:.0%} of the head have the same, brightest value."
        found.append(Finding("cut off", "look", words))
    return found


def missing_slices(modality: str, volume: Array, head: npt.NDArray[np.bool_]) -> list[Finding]:
    """Slices of the head in which a volume is one value: not acquired, or lost."""
    area = head.sum((1, 2))
    useful = area >= 0.1 * area.max()
    empty = useful & (np.ptp(volume.reshape(len(volume), -1), axis=1) == 0)
    if not empty.any():
        return []
    name = display_name(modality)
    words = f"{name} is empty in {empty.sum()} of the head's {useful.sum()} slices."
    return [Finding("empty slices", "look", words)]


def thinning(spacing_mm: Sequence[float]) -> tuple[tuple[slice, ...], list[float]]:
    """Which voxels are left of volumes that are moved about, and the distances between these, in mm."""
    steps = [max(1, round(GRID_MM / side)) for side in spacing_mm]
    sides = [side * step for side, step in zip(spacing_mm, steps, strict=True)]
    return tuple(slice(None, None, step) for step in steps), sides


def shifts(volumes: Mapping[str, Array], sides: Sequence[float]) -> list[Finding]:
    """Volumes whose edges fit the first one's better when they are moved; thinned, with voxels of `sides` mm."""
    first, *others = volumes
    found = []
    edges = {m: _edges(volume) for m, volume in volumes.items()}
    for other in others:
        distance, gain = best_shift(edges[first], edges[other], sides)
        if distance >= SHIFT_MM and gain > GAIN:
            words = (
                f"{display_name(other)} seems to lie {distance:.0f} mm away from "
                f"{display_name(first)}: they may not be registered."
            )
            found.append(Finding("not registered", "refuse" if distance >= FAR_MM else "look", words))
    return found


def _edges(volume: Array) -> Array:
    """Gradient magnitude within slices, bright edges cut off, mean 0."""
    smooth = [ndimage.gaussian_filter(volume, 1, order=[int(axis == a) for a in range(3)]) for axis in (1, 2)]
    edges = np.hypot(*smooth)
    capped: Array = np.minimum(edges, np.percentile(edges, 99))
    capped -= capped.mean()
    return capped


def best_shift(fixed: Array, moving: Array, spacing_mm: Sequence[float]) -> tuple[float, float]:
    """How far, in mm, edges (Z, Y, X) must move to correlate best, and how many times better they then do."""
    room = [int(FARTHEST_MM / side) for side in spacing_mm]  # so that what leaves at one end does not meet the other
    size = [fft.next_fast_len(n + more, real=True) for n, more in zip(fixed.shape, room, strict=True)]
    spectrum = fft.rfftn(fixed, size) * np.conj(fft.rfftn(moving, size))
    correlation = fft.irfftn(spectrum, size)
    reach = [min(more, n // 2 - 1) for n, more in zip(size, room, strict=True)]
    near = np.roll(correlation, reach, (0, 1, 2))[tuple(slice(0, 2 * r + 1) for r in reach)]
    peak = np.unravel_index(int(near.argmax()), near.shape)
    moved = [(int(p) - r) * side for p, r, side in zip(peak, reach, spacing_mm, strict=True)]
    still = float(correlation[0, 0, 0])
    return float(np.linalg.norm(moved)), float(near.max()) / still if still > 0 else np.inf


def same_images(volumes: Mapping[str, Array], head: npt.NDArray[np.bool_]) -> list[Finding]:
    """Two volumes that are one image, perhaps scaled."""
    found = []
    inside = np.flatnonzero(head)[:: max(1, int(head.sum()) // VOXELS)]
    for one, other in itertools.combinations(volumes, 2):
        pair = volumes[one].ravel()[inside], volumes[other].ravel()[inside]
        if min(values.std() for values in pair) > 0 and np.corrcoef(*pair)[0, 1] > SAME:
            names = " and ".join(display_name(m) for m in (one, other))
            words = f"{names} are the same image, or nearly: one of them is under a wrong name."
            found.append(Finding("the same image", "refuse", words))
    return found


def swaps(
    volumes: Mapping[str, Array],
    head: npt.NDArray[np.bool_],
    baselines: Mapping[str, Tensor],
    modalities: Sequence[str],
) -> list[Finding]:
    """Two contrasts that look like each other's.

    T2 and another that fit the mean images of the training better with their names exchanged; or two of three or more
    that fit the model's linear regressions far better so.
    """
    known = sorted((m for m in volumes if m in modalities), key=modalities.index)
    if "t2w" in known and "mean_image" in baselines:
        means = {m: baselines["mean_image"][modalities.index(m)].float().numpy() for m in known}
        fits = _fits_of_names(volumes, head, means)
        if fits and min(fits.values()) < MISNAMED:
            return _swapped(sorted(("t2w", min(fits, key=lambda m: fits[m])), key=modalities.index))
    if (
        len(known) < 3
        or "present" not in baselines
        or not together(baselines, [modalities.index(m) for m in known]).any()
    ):
        return []
    inside = np.flatnonzero(head)
    chosen = inside[:: max(1, len(inside) // VOXELS)]
    voxels = [volumes[m].ravel()[chosen] for m in known]
    acquired = np.min(voxels, axis=0) > 0
    voxels = [values[acquired] for values in voxels]
    if not acquired.any():
        return []
    given = [modalities.index(m) for m in known]
    before = _error_of_regressions(voxels, given, baselines)
    best, pair = before, None
    for i, j in itertools.combinations(range(len(known)), 2):
        exchanged = list(given)
        exchanged[i], exchanged[j] = given[j], given[i]
        if (error := _error_of_regressions(voxels, exchanged, baselines)) < best:
            best, pair = error, (known[i], known[j])
    if pair is None or best > SWAPPED * before:
        return []
    return _swapped(pair, "refuse" if "t2w" in known or best <= SURELY_SWAPPED * before else "look")


def _swapped(pair: Sequence[str], severity: Severity = "refuse") -> list[Finding]:
    names = " and ".join(display_name(m) for m in pair)
    words = f"{names} may be swapped: they look like each other's contrast. Compare them before using anything."
    return [Finding("swapped", severity, words)]


def _fits_of_names(
    volumes: Mapping[str, Array], head: npt.NDArray[np.bool_], means: Mapping[str, Array]
) -> dict[str, float]:
    """How much better T2 and each other volume correlate with the mean images of their names than with each other's."""
    box, step = bounding_box(head, 0), max(1, int((head.sum() / ON_GRID) ** (1 / 3)))
    thin = (slice(None, None, step),) * 3
    inside = head[box][thin]
    stretched = {m: resize(mean, inside.shape) for m, mean in means.items()}

    def fit(volume: str, mean: str) -> float:
        values, like = volumes[volume][box][thin], stretched[mean]
        both = inside & (values > 0) & (like > 0)
        return float(np.corrcoef(values[both], like[both])[0, 1]) if both.sum() > 1 else 0.0

    own = fit("t2w", "t2w")
    return {m: fit(m, m) + own - fit(m, "t2w") - fit("t2w", m) for m in means if m != "t2w"}


def _error_of_regressions(voxels: Sequence[Array], named: Sequence[int], baselines: Mapping[str, Tensor]) -> float:
    """Mean absolute error of predicting each contrast by linear regression of the others, under these names, summed."""
    total = 0.0
    for index, target in enumerate(named):
        others = sorted((k for k in range(len(named)) if k != index), key=lambda k: named[k])
        weights = linear_weights(baselines, [named[k] for k in others], target)
        mix = sum(weight * voxels[k] for weight, k in zip(weights, others, strict=False)) + weights[len(others)]
        total += float(np.abs(np.clip(mix, 0, 1) - voxels[index]).mean())
    return total


def unenhanced(
    t1n: Array, t1c: Array, head: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float], stripped: bool = True
) -> list[Finding]:
    """A T1 with vessels that are bright beside the T1ce, and not the other way round."""
    if compare_within(t1n, t1c, head, spacing_mm, stripped).at(SUSPECT) != "first":
        return []
    words = "T1 shows vessels that T1ce does not: they seem to be swapped. Compare them before using anything."
    return [Finding("vessels", "look", words)]
