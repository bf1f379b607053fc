"""Baselines for every result: a constant, the mean image, and the linear regression of a target on the sources.

They are fitted to the training patients and stored with the model as `baselines.safetensors`. Exactly 0, where nothing
was acquired or the background was masked, is no intensity: it is not fitted to, and predicted where all sources are 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from crossmr.data.head import DARKEST, HIGHEST, LOWEST

Array = npt.NDArray[np.float32]
GRID = (48, 64, 64)
"""Voxels (Z, Y, X) of the grid on which heads are averaged, each stretched to fill it."""
BASELINES = ("constant", "mean image", "linear regression")
MEDIAN = -LOWEST / (HIGHEST - LOWEST)
"""The median within the head, of every patient by the intensity scale."""


def fit_baselines(cases: Sequence[Callable[[], Mapping[str, Array]]], modalities: Sequence[str]) -> dict[str, Tensor]:
    """Fit all baselines to training cases: functions that read head-cropped volumes (Z, Y, X) in [0, 1].

    Returns 'mean_image' (M, *GRID), float16, over the patients who have an intensity there (MEDIAN where none has),
    and, for each of the P combinations of modalities that cases have, 'present' (P, M), uint8, and 'gram'
    (P, M + 1, M + 1), float64: sums of the products of modalities and a constant, over the voxels in which all of the
    combination are above 0. From these follows the least-squares regression of any target on any sources.
    """
    sums, counts = np.zeros((2, len(modalities), *GRID))
    grams: dict[tuple[bool, ...], npt.NDArray[np.float64]] = {}
    for read in cases:
        volumes = {m: volume for m, volume in read().items() if m in modalities}
        for index, modality in enumerate(modalities):
            if modality in volumes:
                sums[index] += resize(volumes[modality], GRID)
                counts[index] += resize((volumes[modality] > 0).astype(np.float32), GRID)
        if volumes:
            inside = np.logical_and.reduce([volume > 0 for volume in volumes.values()])
            missing = np.zeros(inside.sum(), np.float32)
            columns = _columns([volumes[m][inside] if m in volumes else missing for m in modalities])
            present = tuple(m in volumes for m in modalities)
            grams[present] = grams.get(present, 0) + columns @ columns.T
    mean = np.divide(sums, counts, out=np.full_like(sums, MEDIAN), where=counts > 1e-3)
    size = len(modalities) + 1
    return {
        "mean_image": torch.from_numpy(mean).half(),
        "present": torch.tensor(list(grams), dtype=torch.uint8).reshape(-1, len(modalities)),
        "gram": torch.from_numpy(np.stack([*grams.values()]) if grams else np.zeros((0, size, size))),
    }


def with_earlier(fitted: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fitted baselines; of modalities that none of their cases has, those of earlier ones of the same modalities."""
    absent = ~fitted["present"].bool().any(0)
    kept = earlier["present"].bool()[:, absent].any(1)
    mean = torch.where(absent[:, None, None, None], earlier["mean_image"], fitted["mean_image"])
    both = {name: torch.cat([fitted[name], earlier[name][kept]]) for name in ("present", "gram")}
    return {"mean_image": mean, **both}


def together(fitted: Mapping[str, Tensor], known: Sequence[int]) -> Tensor:
    """Which of the combinations of modalities that training patients had hold all of these, bool (P,)."""
    return fitted["present"][:, list(known)].bool().all(1)


def linear_weights(fitted: Mapping[str, Tensor], sources: Sequence[int], target: int) -> npt.NDArray[np.float64]:
    """Least-squares weights (S + 1,) of the sources and a constant, over the cases that have sources and target."""
    gram = fitted["gram"][together(fitted, [*sources, target])].sum(0).numpy()
    rows = [*sources, len(gram) - 1]
    weights: npt.NDArray[np.float64] = np.linalg.lstsq(gram[np.ix_(rows, rows)], gram[rows, target], rcond=None)[0]
    return weights


def linear_regression(
    fitted: Mapping[str, Tensor], modalities: Sequence[str], sources: Mapping[str, Array], target: str
) -> Array | None:
    """Predict a target from sources of one shape as `predict_baselines` does.

    None where no training patient had these sources together with the target.
    """
    chosen = [modalities.index(m) for m in (*sources, target)]
    if not together(fitted, chosen).any():
        return None
    columns = _columns([np.where(volume > 0, volume, MEDIAN) for volume in sources.values()])
    mix = (linear_weights(fitted, chosen[:-1], chosen[-1]) @ columns).reshape(next(iter(sources.values())).shape)
    return _within(_given(sources), mix)


def predict_baselines(
    fitted: Mapping[str, Tensor], modalities: Sequence[str], sources: Mapping[str, Array], targets: Sequence[str]
) -> dict[str, list[Array]]:
    """Predict every target from head-cropped sources (Z, Y, X): baseline → one volume per target, in [DARKEST, 1].

    It is 0 where all sources are; where some are, the median stands for them. There is no linear regression where no
    training patient had the sources together with one of the targets.
    """
    given = _given(sources)
    images = [fitted["mean_image"][modalities.index(target)].float().numpy() for target in targets]
    linear = [linear_regression(fitted, modalities, sources, target) for target in targets]
    predicted: tuple[list[Array], ...] = (
        [_within(given, np.full(given.shape, MEDIAN)) for _ in targets],
        [_within(given, resize(image, given.shape)) for image in images],
        [image for image in linear if image is not None],
    )
    return {name: some for name, some in zip(BASELINES, predicted, strict=True) if len(some) == len(targets)}


def _given(sources: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    """Where there is any source."""
    given: npt.NDArray[np.bool_] = np.logical_or.reduce([volume > 0 for volume in sources.values()])
    return given


def _within(given: npt.NDArray[np.bool_], image: npt.NDArray[Any]) -> Array:
    return np.where(given, np.clip(image, DARKEST, 1), 0).astype(np.float32)


def _columns(volumes: Sequence[Array]) -> npt.NDArray[np.float64]:
    """The volumes and a constant as rows, (M + 1, N)."""
    flat = [volume.ravel().astype(np.float64) for volume in volumes]
    return np.stack([*flat, np.ones_like(flat[0])])


def resize(image: Array, shape: Sequence[int]) -> Array:
    """Stretch a volume (Z, Y, X) to fill another shape, linearly."""
    factors = [new / old for new, old in zip(shape, image.shape, strict=True)]
    resized: Array = ndimage.zoom(image, factors, order=1, mode="nearest", grid_mode=True)
    return resized
