"""Which of two T1 is enhanced: a phantom with vessels in either order, and what must not be taken for such a pair."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import image
from scipy import ndimage

from crossmr.data import enhancement
from crossmr.data.enhancement import compare, compare_within
from crossmr.data.naming import find_studies
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.phantom import write_cohort

SPACING = (5.0, 2.6, 2.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A phantom, with skull."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 1, seed=3, shape=(72, 84, 32), spacing_mm=(2.6, 2.6, 5.0))
    return folder


@pytest.fixture(scope="module")
def volumes(folder):
    """Modality → volume."""
    (files,) = find_studies(folder)
    return {m: read_volume(path) for m, path in files.images().items()}


def changed(volume, change):
    return replace(volume, data=np.ascontiguousarray(change(volume.data), np.float32))


def noisy(data):
    return data + np.random.default_rng(0).normal(0, 0.04 * np.median(data[data > data.mean()]), data.shape)


CHANGES = {
    "nothing": lambda data: data,
    "noise": noisy,
    "bias": lambda data: data * np.linspace(0.8, 1.2, data.shape[2]),
    "blur": lambda data: ndimage.gaussian_filter(data, (0, 0.5, 0.5)),
    "moved": lambda data: np.roll(data, 1, 1),
    "other units": lambda data: (data - data.mean()) / data.std(),
    "another grey scale": lambda data: (data / data.mean()) ** 1.4,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_enhanced_one_is_found_in_either_order(change, volumes):
    plain, bright = volumes["t1n"], changed(volumes["t1c"], CHANGES[change])
    assert compare(plain, bright).enhanced == "second"
    assert compare(bright, plain).enhanced == "first"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("modality", ["t1n", "t1c"])
def test_the_same_volume_twice_is_no_pair(modality, change, volumes):
    assert compare(volumes[modality], changed(volumes[modality], CHANGES[change])).enhanced == "neither"


@pytest.mark.parametrize("other", ["t2w", "t2f"])
@pytest.mark.parametrize("modality", ["t1n", "t1c"])
def test_another_contrast_is_no_pair(modality, other, volumes):
    assert compare(volumes[modality], volumes[other]).enhanced == "neither"
    assert compare(volumes[other], volumes[modality]).enhanced == "neither"


def test_volumes_on_other_grids_are_compared_where_they_lie(volumes):
    """Thick sagittal slices of the enhanced one, its axes another way round, and half of the slices of the other."""
    data, affine = volumes["t1c"].data.transpose(2, 1, 0), volumes["t1c"].affine
    thick = data[: len(data) // 2 * 2].reshape(len(data) // 2, 2, *data.shape[1:]).mean(1)
    wide = affine.copy()
    wide[:3, 3] += affine[:3, 0] / 2
    wide[:3, 0] *= 2
    sagittal = read_volume(
        (thick[::-1], wide @ np.diag([-1, 1, 1, 1]) + np.outer(wide[:, 0] * (len(thick) - 1), [0, 0, 0, 1]))
    )
    upper = volumes["t1n"].data.transpose(2, 1, 0)[..., 12:]
    cut = affine.copy()
    cut[:3, 3] += 12 * affine[:3, 2]
    part = read_volume((upper, cut))
    assert compare(part, sagittal).enhanced == "second"
    assert compare(sagittal, part).enhanced == "first"


def test_stripped_brains_and_brains_too_small(volumes):
    study = load_study({m: (v.data.T, v.affine) for m, v in volumes.items()})
    brain = enhancement.within_skull(volumes["t1n"].data, volumes["t1c"].data, study.mask, SPACING)
    assert 300_000 < brain.sum() * np.prod(SPACING) < 1_400_000
    t1n, t1c = volumes["t1n"].data, volumes["t1c"].data
    assert compare_within(t1n, t1c, brain, SPACING, True).enhanced == "second"
    assert compare_within(t1n, t1c, brain & False, SPACING, True) == enhancement.UNKNOWN
    brain[: int(np.flatnonzero(brain.any((1, 2)))[-1])] = False  # one slice is left
    assert compare_within(t1n, t1c, brain, SPACING, True) == enhancement.UNKNOWN


def test_a_head_that_is_empty_or_flat_is_no_pair():
    empty, flat = (read_volume(image(np.full((40, 40, 20), value, np.float32))) for value in (0, 1))
    assert compare(empty, flat).enhanced == "neither"
    head = np.ones((20, 40, 40), bool)
    for values in (np.zeros(head.shape), np.ones(head.shape), np.indices(head.shape)[0] > 18):
        for stripped in (False, True):
            volume = values.astype(np.float32)
            assert compare_within(volume, volume, head, (5, 5, 5), stripped).enhanced == "neither"


def test_nan_outside_the_head_says_nothing(volumes):
    holes = volumes["t1c"].data.copy()
    holes[:, :, :3] = np.nan
    assert compare(volumes["t1n"], changed(volumes["t1c"], lambda _: holes)).enhanced == "second"
