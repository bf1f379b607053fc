"""The head is found with a skull or without, and intensities lie in [0, 1] whatever their unit."""

import numpy as np
import pytest
from conftest import ellipsoid, image, make_head
from scipy import ndimage

from crossmr.data.head import (
    bounding_box,
    fill_slices,
    fit_normalisation,
    foreground,
    largest_component,
    otsu_threshold,
)
from crossmr.data.study import Study, load_study

HEAD = ellipsoid().T


def load(**volumes: np.ndarray) -> Study:
    """A study of arrays (X, Y, Z)."""
    return load_study({modality: image(data) for modality, data in volumes.items()}, "P1")


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Dice coefficient."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def z_scored(data: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 within the brain, exactly 0 outside: as many public sets are stored."""
    brain = data != 0
    return np.where(brain, (data - data[brain].mean()) / data[brain].std(), 0).astype(np.float32)


# ---------------------------------------------------------------------------------------- normalisation


def test_normalised_magnitude_images_are_in_0_to_1_with_air_at_0():
    study = load(t1n=make_head(), t2f=make_head("t2f"))
    assert not study.masked_background
    for modality in study.volumes:
        normalised = study.normalised(modality)
        assert normalised.dtype == np.float32
        assert 0 == normalised.min() < normalised.max() <= 1
        assert np.median(normalised[study.mask]) == pytest.approx(0.25, abs=1e-6)
        assert np.median(normalised[~HEAD]) < 1e-3
        assert np.quantile(normalised[~HEAD], 0.99) < 0.06  # noise of 2 in a range of some 130


def test_a_bright_scalp_does_not_move_the_brain():
    head = make_head()
    bright = np.where(HEAD.T & ~ndimage.binary_erosion(HEAD.T), 5 * head, head)
    a, b = (fit_normalisation(data.T, HEAD) for data in (head, bright))
    assert b.high - b.low < 1.3 * (a.high - a.low)
    assert np.percentile(bright.T[HEAD], 99.9) > 3 * np.percentile(head.T[HEAD], 99.9)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e5])
@pytest.mark.parametrize("air", [True, False])
def test_the_unit_of_the_intensities_does_not_matter(scale, air):
    plain, scaled = load(t1n=make_head(air=air)), load(t1n=make_head(air=air) * np.float32(scale))
    np.testing.assert_array_equal(plain.mask, scaled.mask)
    np.testing.assert_allclose(plain.normalised("t1n"), scaled.normalised("t1n"), atol=2e-6)


@pytest.mark.parametrize("offset", [-1024, 500])
def test_an_offset_does_not_matter(offset):
    plain, shifted = load(t1n=make_head()), load(t1n=make_head() + np.float32(offset))
    assert overlap(plain.mask, shifted.mask) > 0.999
    assert shifted.normalisation["t1n"].low == pytest.approx(plain.normalisation["t1n"].low + offset, abs=0.01)
    np.testing.assert_allclose(plain.normalised("t1n"), shifted.normalised("t1n"), atol=1e-4)


def test_a_masked_background_that_is_not_0_becomes_0():
    stripped = make_head(air=False)
    study = load(t1n=np.where(stripped == 0, np.float32(-1000), stripped))
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)
    assert (study.normalised("t1n")[~HEAD] == 0).all()


def test_z_scores_have_a_background_of_0():
    study = load(t1n=z_scored(make_head(air=False)), t2f=z_scored(make_head("t2f", air=False)))
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)
    for modality in study.volumes:
        normalised, low = study.normalised(modality), study.normalisation[modality].low
        assert low < -1
        assert (normalised[~HEAD] == 0).all()
        assert 0 == normalised.min() < normalised.max() <= 1
        assert (normalised[HEAD] == 0).mean() < 0.01  # the dark half of the brain is not cut off
        assert np.median(normalised[HEAD]) == pytest.approx(0.25, abs=1e-6)


def test_few_voxels_saturate():
    study = load(t1n=make_head(), t2f=make_head("t2f"))
    for modality, volume in study.volumes.items():
        normalisation = study.normalisation[modality]
        scaled = normalisation.scale(volume.data)
        within = (volume.data > normalisation.low) & (volume.data < normalisation.high)
        np.testing.assert_array_equal(within, (scaled > 0) & (scaled < 1))
        assert within[study.mask].mean() > 0.99
        np.testing.assert_array_equal(np.clip(scaled, 0, 1), study.normalised(modality))


def test_a_single_hot_voxel_does_not_set_the_scale():
    plain, hot = make_head(), make_head()
    hot[14, 16, 12] = 1e5
    a, b = (fit_normalisation(data.T, HEAD) for data in (plain, hot))
    assert b.high - b.low < 1.1 * (a.high - a.low)


def test_a_normalisation_of_two_values_is_finite():
    data = np.where(HEAD, np.float32(7), np.float32(2))
    normalisation = fit_normalisation(data, HEAD)
    np.testing.assert_allclose(normalisation.apply(data), 0.25 * HEAD, atol=1e-6)
    flat = fit_normalisation(np.full_like(data, 7), HEAD)
    assert flat.high > flat.low


# ------------------------------------------------------------------------------------------------- mask


def test_the_mask_of_a_stripped_brain_is_exact():
    study = load(t1n=make_head(air=False), t1c=make_head("t1c", air=False))
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)


def test_the_mask_in_noisy_air():
    mask, exact = foreground(make_head().T)
    assert not exact
    assert overlap(mask, HEAD) > 0.95


def test_one_noisy_volume_makes_the_background_noisy():
    assert not load(t1n=make_head(air=False), t2f=make_head("t2f")).masked_background


def test_the_mask_is_the_union_of_the_volumes():
    left, right = make_head(air=False), make_head("t2f", air=False)
    left[:10], right[18:] = 0, 0
    np.testing.assert_array_equal(load(t1n=left, t2f=right).mask, HEAD)


def rotated_scan() -> tuple[np.ndarray, np.ndarray]:
    """A scan turned by 45° into a larger grid, whose corners are thus exactly 0; and where its air is."""
    shape = (44, 44, 28)
    x, y, z = (np.abs(a - (n - 1) / 2) for a, n in zip(np.ogrid[:44, :44, :28], shape, strict=True))
    scanned = (x + y < 24) & (z < 13)
    data = np.where(scanned, make_head(shape=shape), 0).astype(np.float32)
    return data, scanned & ~ellipsoid(shape)


def test_noisy_air_within_exactly_zero_corners_is_no_head():
    data, air = rotated_scan()
    different = data != 0
    assert (air & different).sum() > 0.5 * different.sum()  # a mask of all that is not 0 would be mostly air
    assert data[0, 0, 0] == data[-1, -1, -1] == 0
    study = load(t1n=data)
    assert not study.masked_background
    assert overlap(study.mask, ellipsoid(data.shape).T) > 0.95
    assert study.mask[air.T].mean() < 0.03
    assert np.quantile(study.normalised("t1n")[air.T], 0.99) < 0.06


@pytest.mark.parametrize("air", [True, False])
def test_holes_are_filled(air):
    data = make_head(air=air)
    hole = np.s_[11:16, 13:18, 9:15]
    data[hole] = 0 if not air else data[:5, :5, :6]
    study = load(t1n=data)
    assert study.mask.T[hole].all()
    assert overlap(study.mask, HEAD) > 0.95


@pytest.mark.parametrize("air", [True, False])
def test_only_the_largest_part_is_head(air):
    data = make_head(air=air, shape=(44, 32, 24))
    marker = np.s_[2:7, 13:18, 9:14]
    data[marker] = 120
    study = load(t1n=data)
    assert not study.mask.T[marker].any()
    assert overlap(study.mask, ellipsoid(data.shape).T) > 0.95


def test_largest_component_and_fill_slices():
    mask = np.zeros((3, 9, 9), bool)
    assert not largest_component(mask).any()
    mask[1, 1:6, 1:6] = True
    mask[1, 3, 3] = False
    mask[1, 8, 8] = True
    wanted = np.zeros_like(mask)
    wanted[1, 1:6, 1:6] = True
    np.testing.assert_array_equal(fill_slices(largest_component(mask)), wanted)


def test_the_box_is_tight_and_stays_inside():
    mask = np.zeros((10, 20, 30), bool)
    mask[2:5, 7:9, 29] = True
    assert bounding_box(mask, 0) == np.s_[2:5, 7:9, 29:30]
    assert bounding_box(mask, 4) == np.s_[0:9, 3:13, 25:30]
    study = load(t1n=make_head(air=False))
    assert study.mask[study.box(0)].sum() == study.mask.sum()
    assert all(study.mask[study.box(0)].any(axis=(a, b))[[0, -1]].all() for a, b in [(0, 1), (0, 2), (1, 2)])


def test_otsu_lies_between_air_and_tissue():
    rng = np.random.default_rng(0)
    parts = rng.normal(5, 2, 7000), rng.normal(100, 10, 3000), rng.uniform(0, 100, 500)
    data = np.concatenate(parts).astype(np.float32)
    assert 15 < otsu_threshold(data) < 40
    assert otsu_threshold(data + 1000) == pytest.approx(otsu_threshold(data) + 1000, abs=1)


def test_otsu_of_a_nearly_empty_volume_is_above_its_background():
    data = np.zeros((10, 10, 10), np.float32)
    data[5, 5, 5:8] = (1, 2, 3)
    assert 0 < otsu_threshold(data) < 3


@pytest.mark.parametrize(("side", "masked"), [(28, True), (25, False)])
def test_a_black_border_masks_the_background_only_where_little_air_is_left(side, masked):
    """A head of `side`³ voxels in 30³ that are not black: 19 % air, or 42 %."""
    data = np.zeros((40, 40, 40), np.float32)
    data[5:35, 5:35, 5:35] = 0.01 + 5 * np.random.default_rng(0).random((30, 30, 30)) ** 4
    data[6 : 6 + side, 6 : 6 + side, 6 : 6 + side] = 100
    mask, exact = foreground(data)
    assert exact == masked
    assert mask.sum() == pytest.approx(30**3 if masked else side**3, rel=0.05)
