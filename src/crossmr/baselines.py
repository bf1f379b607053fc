"""Baselines for every result: zeros, the mean image, and the linear regression of a target on the sources.

They are fitted to the training patients and stored with the model as `baselines.safetensors`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

Array = npt.NDArray[np.float32]
GRID = (48, 64, 64)
"""Voxels (Z, Y, X) of the grid on which heads are averaged, each stretched to fill it."""
BASELINES = ("zeros", "mean image", "linear regression")


def fit_baselines(cases: Sequence[Callable[[], Mapping[str, Array]]], modalities: Sequence[str]) -> dict[str, Tensor]:
    """Fit all baselines to training cases: functions that read head-cropped volumes (Z, Y, X) in [0, 1].

    Returns 'mean_image' (M, *GRID), float16, and, for each of the P combinations of modalities that cases have,
    'present' (P, M), uint8, and 'gram' (P, M + 1, M + 1), float64: sums over all voxels of the products of modalities
    and a constant. From these follows the least-squares regression of any target on any sources.
    """
    mean, counts = np.zeros((len(modalities), *GRID)), np.zeros(len(modalities))
    grams: dict[tuple[bool, ...], npt.NDArray[np.float64]] = {}
    for read in cases:
        volumes = {m: volume for m, volume in read().items() if m in modalities}
        for index, modality in enumerate(modalities):
            if modality in volumes:
                mean[index] += resize(volumes[modality], GRID)
                counts[index] += 1
        if volumes:
            shape = next(iter(volumes.values())).shape
            columns = _columns([volumes.get(m, np.zeros(shape, np.float32)) for m in modalities])
            present = tuple(m in volumes for m in modalities)
            grams[present] = grams.get(present, 0) + columns @ columns.T
    mean /= np.maximum(counts, 1)[:, None, None, None]
    size = len(modalities) + 1
    return {
        "mean_image": torch.from_numpy(mean).half(),
        "present": torch.tensor(list(grams), dtype=torch.uint8).reshape(-1, len(modalities)),
        "gram": torch.from_numpy(np.stack([*grams.values()]) if grams else np.zeros((0, size, size))),
    }


def linear_weights(fitted: Mapping[str, Tensor], sources: Sequence[int], target: int) -> npt.NDArray[np.float64]:
    """Least-squares weights (S + 1,) of the sources and a constant, over the cases that have sources and target."""
    usable = fitted["present"][:, [*sources, target]].bool().all(1)
    gram = fitted["gram"][usable].sum(0).numpy()
    rows = [*sources, len(gram) - 1]
    weights: npt.NDArray[np.float64] = np.linalg.lstsq(gram[np.ix_(rows, rows)], gram[rows, target], rcond=None)[0]
    return weights


def predict_baselines(
    fitted: Mapping[str, Tensor], modalities: Sequence[str], sources: Mapping[str, Array], targets: Sequence[str]
) -> dict[str, list[Array]]:
    """Predict every target from head-cropped sources (Z, Y, X): baseline → one volume in [0, 1] per target."""
    shape = next(iter(sources.values())).shape
    columns, chosen = _columns(list(sources.values())), [modalities.index(m) for m in sources]
    indices = [modalities.index(target) for target in targets]
    linear = [np.clip(linear_weights(fitted, chosen, t) @ columns, 0, 1).reshape(shape) for t in indices]
    images = [np.clip(resize(fitted["mean_image"][t].float().numpy(), shape), 0, 1) for t in indices]
    return {
        "zeros": [np.zeros(shape, np.float32) for _ in indices],
        "mean image": [image.astype(np.float32) for image in images],
        "linear regression": [image.astype(np.float32) for image in linear],
    }


def _columns(volumes: Sequence[Array]) -> npt.NDArray[np.float64]:
    """The volumes and a constant as rows, (M + 1, N)."""
    flat = [volume.ravel().astype(np.float64) for volume in volumes]
    return np.stack([*flat, np.ones_like(flat[0])])


def resize(image: Array, shape: Sequence[int]) -> Array:
    """Stretch a volume (Z, Y, X) to fill another shape, linearly."""
    factors = [new / old for new, old in zip(shape, image.shape, strict=True)]
    resized: Array = ndimage.zoom(image, factors, order=1, mode="nearest", grid_mode=True)
    return resized
