"""The trivial predictors beside every result: zeros, the mean image, the best linear mix of the sources.

They are fitted on the training patients and travel with the model as `trivial.safetensors`.
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
NAMES = ("zeros", "mean image", "linear mix")


def fit_trivial(
    cases: Sequence[Callable[[], Mapping[str, Array]]], sources: Sequence[str], targets: Sequence[str]
) -> dict[str, Tensor]:
    """Fit all predictors on training cases: calls that read head-cropped volumes (Z, Y, X) in [0, 1].

    Returns 'mean_image' (T, *GRID) and 'linear' (T, S + 1), the least-squares weights of the sources and a
    constant over all voxels. Cases that lack a modality are left out where it is needed.
    """
    mean, counts = np.zeros((len(targets), *GRID)), np.zeros(len(targets))
    gram = np.zeros((len(targets), len(sources) + 1, len(sources) + 1))
    moment = np.zeros((len(targets), len(sources) + 1))
    for read in cases:
        volumes = read()
        for index, target in enumerate(targets):
            if target not in volumes:
                continue
            mean[index] += _resize(volumes[target], GRID)
            counts[index] += 1
            if all(source in volumes for source in sources):
                columns = _columns([volumes[source] for source in sources])
                gram[index] += columns @ columns.T
                moment[index] += columns @ volumes[target].ravel().astype(np.float64)
    weights = [np.linalg.lstsq(g, b, rcond=None)[0] for g, b in zip(gram, moment, strict=True)]
    mean /= np.maximum(counts, 1)[:, None, None, None]
    return {
        "mean_image": torch.from_numpy(mean).float(),
        "linear": torch.from_numpy(np.stack(weights)).float(),
    }


def predict_trivial(fitted: Mapping[str, Tensor], sources: Sequence[Array]) -> dict[str, list[Array]]:
    """Predict every target, (Z, Y, X) in [0, 1], from head-cropped sources: name → one volume a target."""
    shape = sources[0].shape
    columns = _columns(sources)
    linear = [np.clip(w.numpy().astype(np.float64) @ columns, 0, 1).reshape(shape) for w in fitted["linear"]]
    images = [np.clip(_resize(m.numpy(), shape), 0, 1) for m in fitted["mean_image"]]
    return {
        "zeros": [np.zeros(shape, np.float32) for _ in linear],
        "mean image": [image.astype(np.float32) for image in images],
        "linear mix": [image.astype(np.float32) for image in linear],
    }


def _columns(sources: Sequence[Array]) -> npt.NDArray[np.float64]:
    """The sources and a constant as rows, (S + 1, N)."""
    flat = [source.ravel().astype(np.float64) for source in sources]
    return np.stack([*flat, np.ones_like(flat[0])])


def _resize(image: Array, shape: Sequence[int]) -> Array:
    factors = [want / have for want, have in zip(shape, image.shape, strict=True)]
    resized: Array = ndimage.zoom(image, factors, order=1, mode="nearest", grid_mode=True)
    return resized
