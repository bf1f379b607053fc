"""The protocols of others: their SSIM against its definition written out, their drop, and what they let pass."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import SHAPE, write_study

from crossmr.data.naming import find_studies
from crossmr.errors import StudyError
from crossmr.evaluation.protocols import (
    ERASED,
    ZEROS,
    dice,
    dropped_contrasts,
    measure_by,
    on_whole_grid,
    own_scale,
    whole_ssim,
)
from crossmr.evaluation.subjects import subject_of_files

ALL = ("t1n", "t1c", "t2w", "t2f")


def random_pair(shape=(13, 14, 12), seed=0):
    return np.random.default_rng(seed).random((2, *shape)).astype(np.float32)


def direct_ssim(x, y, span):
    """Every window whole, in float64: weights of 11 taps an axis, borders mirrored without the edge voxel."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()
    weights = np.einsum("i,j,k->ijk", taps, taps, taps)
    padded = [np.pad(image.astype(np.float64), 5, mode="reflect") for image in (x, y)]
    a, b = (np.lib.stride_tricks.sliding_window_view(image, (11, 11, 11)) for image in padded)

    def mean(*factors):
        return np.einsum("...ijk,...ijk,ijk->...", *factors, weights)

    one = np.broadcast_to(1.0, a.shape)
    mean_a, mean_b = mean(a, one), mean(b, one)
    var_a, var_b = mean(a, a) - mean_a**2, mean(b, b) - mean_b**2
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    contrast = (2 * (mean(a, b) - mean_a * mean_b) + c2) / (np.maximum(var_a, 0) + np.maximum(var_b, 0) + c2)
    return float((luminance * contrast).mean())


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A study with a lesion of 48 voxels."""
    folder = tmp_path_factory.mktemp("cohort")
    write_study(folder, "P", ALL, air=False, lesion=True)
    return subject_of_files(find_studies(folder)[0])


# The drop


def test_the_drop_is_the_challenges_own():
    """`np.random.seed(123456); np.random.randint(0, 4, size=12)` gives 1 2 2 1 0 3 3 3 3 0 3 0."""
    cases = [f"P{n:02}" for n in range(12)]
    drawn = [("t1c", "t1n", "t2f", "t2w")[n] for n in (1, 2, 2, 1, 0, 3, 3, 3, 3, 0, 3, 0)]
    assert dropped_contrasts(cases) == dict(zip(cases, drawn, strict=True))


def test_the_drop_goes_by_the_order_of_names_and_leaves_the_global_generator_alone():
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    assert dropped_contrasts(["C", "A", "B"]) == {"A": "t1n", "B": "t2f", "C": "t2f"}
    assert np.random.random() == expected  # noqa: NPY002


# SSIM


@pytest.mark.parametrize("span", [None, 1.0])
def test_ssim_is_its_definition_written_out(span):
    x, y = random_pair()
    x *= np.float32(0.4)
    assert whole_ssim(x, y, span) == pytest.approx(direct_ssim(x, y, span or float(np.ptp(y))), abs=1e-6)


@pytest.mark.parametrize("inside", [np.s_[6:7, 9:11, 20:22], np.s_[0:3, 9:11, 28:30], np.s_[3:21, 0:20, :]])
def test_a_background_of_zeros_counts_voxel_by_voxel(inside):
    """Only the box around what is not 0 is computed; the mean is over every voxel all the same."""
    x, y = np.zeros((2, 24, 20, 30), np.float32)
    given = np.random.default_rng(1)
    x[inside], y[inside] = given.random((2, *x[inside].shape))
    assert whole_ssim(x, y, 1.0) == pytest.approx(direct_ssim(x, y, 1.0), abs=1e-6)


def test_ssim_of_equal_images_is_1_and_of_two_empty_ones_does_not_exist():
    x, _ = random_pair()
    assert whole_ssim(x, x) == pytest.approx(1, abs=1e-6)
    empty = np.zeros_like(x)
    assert math.isnan(whole_ssim(empty, empty))
    assert whole_ssim(empty, empty, 1.0) == 1.0


# Scaling


def test_each_image_is_scaled_by_its_own_percentiles():
    image = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    scaled = own_scale(image)
    assert scaled.dtype == np.float32
    assert (scaled.min(), scaled.max()) == (0, 1)
    assert scaled.ravel()[500] == pytest.approx((500 - 5) / 990)
    np.testing.assert_allclose(own_scale(3 * image), scaled, atol=1e-6)


def test_the_lower_percentile_is_at_least_0_and_a_constant_gives_zeros():
    image = np.linspace(-100, 100, 1001, dtype=np.float32).reshape(7, 11, 13)
    assert own_scale(image).ravel()[500] == 0
    assert own_scale(image).ravel()[750] == pytest.approx(50 / 99, abs=1e-3)
    for value in (0, 5):
        assert not own_scale(np.full((4, 4, 4), value, np.float32)).any()


def test_volumes_lie_where_the_scan_had_them(subject):
    assert subject.grid == SHAPE[::-1]
    full = on_whole_grid(subject.tumour, subject)
    assert full.dtype == bool
    expected = np.zeros(SHAPE[::-1], bool)
    expected[10:13, 14:18, 12:16] = True
    np.testing.assert_array_equal(full, expected)


# BraSyn


def test_brasyn_measures_whole_tumour_and_healthy(subject):
    truth = subject.volumes["t2f"]
    rng = np.random.default_rng(0)
    image = np.where(subject.head, np.clip(truth + rng.normal(0, 0.05, truth.shape), 0, 1), 0).astype(np.float32)
    measured = measure_by("brasyn", subject, "t2f", {"own": image, "truth": truth})
    assert list(measured) == ["own", "truth", ZEROS, ERASED]
    assert measured["truth"] == pytest.approx({"ssim_whole": 1, "ssim_tumour": 1, "ssim_healthy": 1}, abs=1e-6)
    air = subject.air["t2f"]
    x, y = (
        own_scale(on_whole_grid(np.where(v > 0, np.maximum(v - np.float32(air), 0), 0), subject))
        for v in (image, truth)
    )
    tumour = on_whole_grid(subject.tumour, subject)
    for name, mask in (("whole", True), ("tumour", tumour), ("healthy", ~tumour)):
        a, b = x * mask, y * mask
        expected = direct_ssim(a, b, max(np.ptp(a), np.ptp(b)))
        assert measured["own"][f"ssim_{name}"] == pytest.approx(expected, abs=1e-5), name


def test_a_lesion_is_erased_by_the_median_of_what_the_target_has(subject):
    """A skull that others have and the target lacks is none of it."""
    wide = dataclasses.replace(subject, head=np.ones_like(subject.head))
    zeros = {"t2f": np.where(subject.head, subject.volumes["t2f"], np.float32(0))}
    own, beside = (measure_by("brasyn", dataclasses.replace(one, volumes=zeros), "t2f", {}) for one in (subject, wide))
    assert own[ERASED] == beside[ERASED]


def test_brasyn_forgives_a_wrong_scale_and_nearly_forgives_an_empty_image(subject):
    """Both are what the documentation says that it hides."""
    truth, air = subject.volumes["t2f"], np.float32(subject.air["t2f"])
    brighter = np.where(truth > 0, air + 1.5 * (truth - air), 0).astype(np.float32)
    measured = measure_by("brasyn", subject, "t2f", {"brighter": brighter})
    assert measured["brighter"]["ssim_whole"] > 0.99
    assert 0.9 < measured[ZEROS]["ssim_tumour"] < 1
    assert measured[ERASED]["ssim_healthy"] > 0.99


def test_brasyn_without_labels_is_the_whole_alone(subject):
    bare = dataclasses.replace(subject, tumour=np.zeros_like(subject.tumour))
    measured = measure_by("brasyn", bare, "t1n", {})
    assert list(measured) == [ZEROS]
    assert list(measured[ZEROS]) == ["ssim_whole"]


# Published tables


def test_published_scales_by_the_truth_over_the_whole_scan(subject):
    truth, air = subject.volumes["t1c"], np.float32(subject.air["t1c"])
    brighter = np.where(truth > 0, air + 1.5 * (truth - air), 0).astype(np.float32)
    measured = measure_by("published", subject, "t1c", {"truth": truth, "brighter": brighter})
    assert measured["truth"] == {"psnr": math.inf, "ssim": pytest.approx(1, abs=1e-6)}
    above = [on_whole_grid(np.where(v > 0, np.maximum(v - air, 0), 0), subject) for v in (brighter, truth)]
    x, y = (np.clip(v / np.percentile(above[1], 99.5), 0, 1) for v in above)
    assert measured["brighter"]["psnr"] == pytest.approx(-10 * np.log10(np.mean((x - y) ** 2)), abs=1e-3)
    assert measured["brighter"]["ssim"] == pytest.approx(direct_ssim(x, y, 1.0), abs=1e-5)
    assert measured["brighter"]["psnr"] > measured[ZEROS]["psnr"]


def test_published_hardly_sees_that_a_lesion_is_gone(subject):
    erased = measure_by("published", subject, "t2f", {})[ERASED]
    assert erased["psnr"] > 26
    assert erased["ssim"] > 0.9


@pytest.mark.parametrize("protocol", ["brasyn", "published"])
def test_a_truth_that_hardly_fills_the_scan_is_refused(subject, protocol):
    wide = dataclasses.replace(subject, grid=(200, 200, 200))
    with pytest.raises(StudyError, match=r"P: t2w cannot be measured: its 99\.5th percentile"):
        measure_by(protocol, wide, "t2w", {})


# Dice


def test_dice_counts_labels_of_every_year():
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[0], truth[1], truth[2] = 1, 2, 3
    assert dice(truth, truth) == {"dice_wt": 1, "dice_tc": 1, "dice_et": 1}
    older = np.where(truth == 3, np.uint8(4), truth)
    assert dice(older, truth) == {"dice_wt": 1, "dice_tc": 1, "dice_et": 1}
    lost = np.where(truth == 3, np.uint8(2), truth)
    assert dice(lost, truth) == {"dice_wt": 1, "dice_tc": pytest.approx(2 / 3), "dice_et": 0}


def test_dice_is_1_where_neither_has_any():
    empty = np.zeros((4, 4, 4), np.uint8)
    assert dice(empty, empty) == {"dice_wt": 1, "dice_tc": 1, "dice_et": 1}
