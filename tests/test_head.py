"""The head is found with a skull or without, and intensities are standardised within it whatever their unit."""

import numpy as np
import pytest
from conftest import ellipsoid, image, make_head
from scipy import ndimage

from crossmr.data.head import (
    DARKEST,
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


def robust_std(values: np.ndarray) -> float:
    """The range of the quartiles / 1.349."""
    q25, q75 = np.percentile(values, (25, 75))
    return float(q75 - q25) / 1.349


def test_the_head_of_magnitude_images_has_median_1_3_and_robust_deviation_1_15():
    study = load(t1n=make_head(), t2f=make_head("t2f"))
    assert not study.masked_background
    for modality in study.volumes:
        normalised = study.normalised(modality)
        assert normalised.dtype == np.float32
        assert normalised[study.mask].min() >= DARKEST
        assert normalised.max() <= 1
        assert not normalised[~study.mask].any()
        assert np.median(normalised[study.mask]) == pytest.approx(1 / 3, abs=1e-6)
        assert robust_std(normalised[study.mask]) == pytest.approx(1 / 15, abs=1e-6)
        air = study.normalisation[modality].scale(study.volumes[modality].data[~HEAD])
        assert np.quantile(air, 0.9) < np.quantile(normalised[HEAD], 0.01)


@pytest.mark.parametrize("air", [True, False])
def test_a_normalisation_is_invertible_and_knows_air(air):
    data = make_head(air=air).T
    fitted = fit_normalisation(data, HEAD)
    back = fitted.scale(data) * np.float32(fitted.high - fitted.low) + np.float32(fitted.low)
    np.testing.assert_allclose(back, data, atol=1e-3)
    median, spread = float(np.median(data[HEAD])), robust_std(data[HEAD])
    assert (fitted.low, fitted.high) == pytest.approx((median - 5 * spread, median + 10 * spread), rel=1e-5)
    assert fitted.air == pytest.approx(np.median(data[~HEAD]), abs=1e-6)
    assert fitted.air_level == pytest.approx(float(fitted.scale(np.float32(fitted.air))), abs=1e-6)
    assert fitted.air_level < 0  # darker than the scale's end, five deviations below tissue


def test_air_is_not_brighter_than_the_head_and_a_head_without_air_has_its_darkest():
    data = make_head().T
    bright = np.where(HEAD, data, np.float32(1000))
    floor = np.percentile(data[HEAD], 0.5)
    assert fit_normalisation(bright, HEAD).air == pytest.approx(floor)
    everywhere = np.ones_like(HEAD)
    assert fit_normalisation(data, everywhere).air == pytest.approx(np.percentile(data, 0.5))


def change(data: np.ndarray, where: np.ndarray, value: float) -> np.ndarray:
    """A volume (Z, Y, X) with another intensity somewhere."""
    return np.where(where, np.float32(value), data)


@pytest.mark.parametrize("what", ["lesion", "fat", "sinuses", "hot voxel"])
def test_what_is_bright_or_dark_hardly_moves_the_scale(what):
    data = make_head().T
    z, y, x = (a - (n - 1) / 2 for a, n in zip(np.ogrid[:24, :32, :28], HEAD.shape, strict=True))
    changed = {
        "lesion": change(data, z**2 + y**2 + (x - 3) ** 2 < 16, 400),
        "fat": change(data, HEAD & ~ndimage.binary_erosion(HEAD) & (z > 4), 800),
        "sinuses": change(data, z**2 + (y - 7) ** 2 + x**2 < 12, 2),
        "hot voxel": change(data, z**2 + y**2 + x**2 < 1, 1e5),
    }[what]
    share = (changed != data).sum() / HEAD.sum()
    assert 0 < share < 0.12
    plain, other = fit_normalisation(data, HEAD), fit_normalisation(changed, HEAD)
    assert (other.high - other.low) / (plain.high - plain.low) == pytest.approx(1, abs=0.25)
    same = HEAD & (changed == data)
    assert np.abs(other.scale(data[same]) - plain.scale(data[same])).mean() < 0.25 / 15  # of a robust deviation


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
    magnitudes = {"t1n": make_head(air=False), "t2f": make_head("t2f", air=False)}
    study, plain = load(**{m: z_scored(data) for m, data in magnitudes.items()}), load(**magnitudes)
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)
    for modality in study.volumes:
        normalised, fitted = study.normalised(modality), study.normalisation[modality]
        assert fitted.low < fitted.air < -1  # the head's darkest is darker than the background, 0
        assert 0 < fitted.air_level < 1 / 3
        assert (normalised[~HEAD] == 0).all()
        assert DARKEST <= normalised[HEAD].min() < normalised.max() <= 1
        np.testing.assert_allclose(normalised, plain.normalised(modality), atol=1e-4)


def test_negative_and_8_bit_intensities_are_standardised_alike():
    plain = load(t1n=make_head(air=False)).normalised("t1n")
    inverted = load(t1n=np.where(HEAD.T, -make_head(air=False), np.float32(-1000)))
    np.testing.assert_array_equal(inverted.mask, HEAD)
    np.testing.assert_allclose(inverted.normalised("t1n")[HEAD], 2 / 3 - plain[HEAD], atol=0.01)
    eight_bits = load(t1n=np.round(make_head(air=False)).astype(np.uint8)).normalised("t1n")
    assert np.abs(eight_bits - plain)[HEAD].mean() < 0.25 / 15
    np.testing.assert_array_equal(eight_bits > 0, HEAD)


def test_few_voxels_saturate_and_none_of_them_at_0():
    study = load(t1n=make_head(), t2f=make_head("t2f"))
    for modality, volume in study.volumes.items():
        normalisation = study.normalisation[modality]
        scaled = normalisation.scale(volume.data)
        within = (volume.data > normalisation.low) & (volume.data < normalisation.high)
        np.testing.assert_array_equal(within, (scaled > 0) & (scaled < 1))
        assert within[study.mask & HEAD].mean() > 0.98
        want = np.where(study.mask, np.clip(scaled, np.float32(DARKEST), 1), 0)
        np.testing.assert_array_equal(want, study.normalised(modality))
        assert normalisation.apply(np.float32([-1e9, 1e9])).tolist() == [DARKEST, 1]


def test_the_darkest_voxel_of_the_head_is_kept_above_0():
    data = make_head(air=False)
    data[14, 16, 12] = -500
    study = load(t1n=data)
    stored = study.normalised("t1n").astype(np.float16)
    assert float(stored[12, 16, 14]) == DARKEST == float(np.float16(DARKEST))
    np.testing.assert_array_equal(stored > 0, HEAD)


@pytest.mark.parametrize("rare", [0.0, 0.2, 0.001])
def test_few_grey_levels_have_a_finite_scale(rare):
    """A segmentation, say: all of one level, a fifth of another, or a thousandth."""
    rng = np.random.default_rng(0)
    data = np.where(HEAD, np.float32(7), np.float32(2))
    data[HEAD] += 3 * (rng.random(HEAD.sum()) < rare)
    fitted = fit_normalisation(data, HEAD)
    spread = {0.0: 1.0, 0.2: 3 / 3.29, 0.001: float(data[HEAD].std())}[rare]
    assert (fitted.low, fitted.high, fitted.air) == pytest.approx((7 - 5 * spread, 7 + 10 * spread, 2), rel=1e-5)
    normalised = fitted.apply(data)
    np.testing.assert_allclose(normalised[data == 7], 1 / 3, atol=1e-6)
    assert DARKEST <= normalised.min() < normalised.max() <= 1


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
    normalised = study.normalised("t1n")
    assert np.quantile(normalised[air.T], 0.99) < np.quantile(normalised[study.mask], 0.05)


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
