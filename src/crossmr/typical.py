"""What the studies of a training look like, in a few numbers for each contrast and each pair of contrasts.

shape   How much head each eighth of its box holds, along each axis: another where the head is upside down, turned, cut,
        or another part of the body.
smooth  How alike neighbouring voxels are, in each axial slice: low where there is noise, or ghosts.
even    How little the brightness of large regions differs from that of the average head, against the differences within
        them: low under a strong bias field.
edges   Correlation of the edges of two contrasts: low where they are of two patients, or one has moved or is blurred.

Of all training studies, with skull or without, a model keeps median and robust standard deviation of each number.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from torch import Tensor

from crossmr.baselines import GRID, resize

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
GRID_MM = 2.0
"""What volumes are thinned to before their edges are compared."""
LOW_PASS = (6.0, 8.0, 8.0)
"""Of the Gaussian, in voxels of GRID, through which large regions are seen."""
SLICES = 40
"""In which noise is looked for."""
PARTS = 8
"""Of the head's box, along each axis."""
LEAST, LEAST_OF_SHAPE = 0.01, 0.03
"""The least robust standard deviation that is taken for one."""
FEWEST = 5
"""Studies of which a median and a deviation are kept."""


def describe(
    volumes: Mapping[str, Array],
    head: Mask,
    spacing_mm: Sequence[float],
    baselines: Mapping[str, Tensor],
    modalities: Sequence[str],
) -> dict[str, float]:
    """The numbers of one study: 'shape 0' to 'shape 23', 'smooth t1n', 'edges t1n t2w' and so on.

    Args:
        volumes: modality → (Z, Y, X) in [0, 1], 0 outside the head, cut to the head's box.
        head: bool, of the same shape.
        spacing_mm: of (Z, Y, X).
        baselines: of the model, with its average head; see `fit_baselines`.
        modalities: those of the baselines.
    """
    found, edges = _shape(head), {}
    for modality, volume in volumes.items():
        if "mean_image" not in baselines or modality not in modalities:
            continue
        average = baselines["mean_image"][modalities.index(modality)].float().numpy()
        small = resize(volume, GRID)
        found[f"even {modality}"] = -_unevenness(small, average)
        found[f"smooth {modality}"] = _smoothness(volume)
        edges[modality] = _edges(volume, spacing_mm)
    for one, other in itertools.combinations(edges, 2):
        both = (edges[one] >= 0) & (edges[other] >= 0)
        found[f"edges {one} {other}"] = _correlation(edges[one][both], edges[other][both])
    return found


def summarise(described: Iterable[tuple[bool, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Of (whether without skull, numbers) of every study: group → number → its median and robust standard deviation."""
    known: dict[str, dict[str, list[float]]] = {}
    for without_skull, numbers in described:
        group = known.setdefault(group_of(without_skull), {})
        for name, number in numbers.items():
            group.setdefault(name, []).append(number)
    return {
        group: {name: _summary(name, values) for name, values in sorted(numbers.items()) if len(values) >= FEWEST}
        for group, numbers in known.items()
    }


def is_typical(record: Any) -> bool:
    """Whether what a model's record says of its studies is what `summarise` returns."""
    return isinstance(record, dict) and all(
        isinstance(group, dict)
        and all(
            isinstance(pair, list) and [type(n) for n in pair] == [float, float] and pair[1] > 0
            for pair in group.values()
        )
        for group in record.values()
    )


def group_of(without_skull: bool) -> str:
    """The group of studies that one is compared with."""
    return "without_skull" if without_skull else "with_skull"


def deviations(numbers: Mapping[str, float], typical: Mapping[str, Any], *, without_skull: bool) -> dict[str, float]:
    """How many robust standard deviations below the median each number of a study lies, of those that are known.

    'shape' is how far, root mean square, all its parts lie from their medians.
    """
    known = typical.get(group_of(without_skull), {})
    below = {name: (known[name][0] - number) / known[name][1] for name, number in numbers.items() if name in known}
    shape = [below.pop(name) for name in list(below) if name.startswith("shape ")]
    return {**below, "shape": float(np.sqrt(np.mean(np.square(shape))))} if shape else below


def _summary(name: str, values: Sequence[float]) -> list[float]:
    least = LEAST_OF_SHAPE if name.startswith("shape") else LEAST
    q25, median, q75 = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return [round(median, 4), round(max((q75 - q25) / 1.349, least), 4)]


def _shape(head: Mask) -> dict[str, float]:
    """The area of the head in each of PARTS slabs, as a share of the largest slice's, along axes that are so long."""
    found = {}
    for axis in (axis for axis in range(3) if head.shape[axis] >= PARTS):
        area = head.sum(tuple({0, 1, 2} - {axis})).astype(float)
        for k, part in enumerate(np.array_split(area, PARTS)):
            found[f"shape {axis * PARTS + k}"] = float(part.mean() / area.max())
    return found


def _correlation(a: Array, b: Array) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _unevenness(small: Array, average: Array) -> float:
    """Standard deviation of the smoothed difference from the average head, over that of what is not smooth."""
    inside = small > 0
    if not inside.any():
        return 0.0
    weight = np.maximum(ndimage.gaussian_filter(inside.astype(np.float32), LOW_PASS), 1e-3)
    smooth, usual = (ndimage.gaussian_filter(np.where(inside, v, np.float32(0)), LOW_PASS) for v in (small, average))
    q25, q75 = np.percentile((small - smooth / weight)[inside], (25, 75))
    return float(((smooth - usual) / weight)[inside].std() / max((q75 - q25) / 1.349, 1e-6))


def _smoothness(volume: Array) -> float:
    """Correlation of neighbours in X, of what the average over five by five voxels around them leaves."""
    some = volume[:: max(1, len(volume) // SLICES)]
    rest = some - ndimage.uniform_filter(some, (0, 5, 5))
    inside = ndimage.binary_erosion(some > 0, np.ones((1, 5, 5)))
    pairs = inside[:, :, 1:] & inside[:, :, :-1]
    return _correlation(rest[:, :, 1:][pairs], rest[:, :, :-1][pairs])


def _edges(volume: Array, spacing_mm: Sequence[float]) -> Array:
    """Gradient magnitude within slices of a thinned volume, away from the head's border; -1 elsewhere."""
    z, y, x = (max(1, round(GRID_MM / side)) for side in spacing_mm)
    thinned = volume[::z, ::y, ::x]
    smooth = [ndimage.gaussian_filter(thinned, 1, order=[int(axis == a) for a in range(3)]) for axis in (1, 2)]
    edges: Array = np.hypot(*smooth)
    inside = ndimage.binary_erosion(thinned > 0, np.ones((1, 7, 7)))
    if inside.any():
        edges = np.minimum(edges, np.percentile(edges[inside], 99))
    result: Array = np.where(inside, edges, np.float32(-1))
    return result
