"""The baselines, where their answer is known."""

import numpy as np
import pytest
import torch

from crossmr.baselines import (
    BASELINES,
    DARKEST,
    GRID,
    MEDIAN,
    fit_baselines,
    linear_regression,
    linear_weights,
    predict_baselines,
    with_earlier,
)
from crossmr.data import head

SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
MODALITIES = (*SOURCES, *TARGETS)


def of(volumes, names=SOURCES):
    return {name: volumes[name] for name in names}


def weights(fitted, targets=(2, 3)):
    return np.stack([linear_weights(fitted, (0, 1), target) for target in targets])


def volumes(seed, shape=(6, 7, 8), without=()):
    """Random sources and targets that are linear in them."""
    t1n, t2w = np.random.default_rng(seed).uniform(0.01, 1, (2, *shape)).astype(np.float32)
    case = {"t1n": t1n, "t2w": t2w, "t1c": 0.5 * t1n - 0.25 * t2w + 0.3, "t2f": 0.1 * t1n + 0.6 * t2w + 0.05}
    return {name: image for name, image in case.items() if name not in without}


def cases(*made):
    return [lambda case=case: case for case in made]


def test_linear_regression_recovers_a_linear_target():
    fitted = fit_baselines(cases(volumes(0), volumes(1, (5, 9, 4))), MODALITIES)
    np.testing.assert_allclose(weights(fitted), [[0.5, -0.25, 0.3], [0.1, 0.6, 0.05]], atol=1e-5)
    unseen = volumes(2)
    predicted = predict_baselines(fitted, MODALITIES, of(unseen), TARGETS)["linear regression"]
    for image, target in zip(predicted, TARGETS, strict=True):
        np.testing.assert_allclose(image, unseen[target], atol=1e-5)


def test_linear_regression_is_the_least_squares_answer_over_all_voxels():
    rng = np.random.default_rng(0)
    made = [{**volumes(k), "t1c": rng.random((6, 7, 8)).astype(np.float32)} for k in range(3)]
    columns = np.concatenate([np.stack([c["t1n"].ravel(), c["t2w"].ravel(), np.ones(336)], 1) for c in made])
    want = np.linalg.lstsq(columns, np.concatenate([c["t1c"].ravel() for c in made]), rcond=None)[0]
    fitted = fit_baselines(cases(*made), (*SOURCES, "t1c"))
    np.testing.assert_allclose(linear_weights(fitted, (0, 1), 2), want, atol=1e-5)


def test_the_mean_image_of_constant_heads_is_their_mean():
    made = []
    for value, shape in ((0.2, (4, 5, 6)), (0.6, (9, 3, 7))):
        made.append({name: np.full(shape, value, np.float32) for name in (*SOURCES, *TARGETS)})
    fitted = fit_baselines(cases(*made), MODALITIES)
    assert fitted["mean_image"].shape == (4, *GRID)
    torch.testing.assert_close(fitted["mean_image"], torch.full((4, *GRID), 0.4).half())
    given = dict.fromkeys(SOURCES, np.ones((11, 13, 5), np.float32))
    for image in predict_baselines(fitted, MODALITIES, given, TARGETS)["mean image"]:
        np.testing.assert_allclose(image, np.full((11, 13, 5), 0.4), atol=2e-4)


def test_the_mean_image_is_over_the_patients_who_have_an_intensity_there():
    """Heads of .2 and .6; the second's upper half is masked, and nobody has any in the last eighth."""
    first, second = (np.full((48, 8, 8), value, np.float32) for value in (0.2, 0.6))
    first[:, :, 7:] = second[:, :, 7:] = second[24:] = 0
    fitted = fit_baselines(cases({"t1n": first, "t1c": first}, {"t1n": second, "t1c": second}), ("t1n", "t1c"))
    given = {"t1n": np.ones((48, 8, 8), np.float32)}
    (image,) = predict_baselines(fitted, ("t1n", "t1c"), given, ("t1c",))["mean image"]
    np.testing.assert_allclose(image[:23, :, :6], 0.4, atol=1e-3)
    np.testing.assert_allclose(image[25:, :, :6], 0.2, atol=1e-3)
    np.testing.assert_allclose(image[:, :, 7].mean(), MEDIAN, atol=0.05)


def test_the_constant_is_the_median_within_the_head_of_every_training_patient():
    intensities = np.random.default_rng(0).gamma(4, 100, (12, 12, 12)).astype(np.float32)
    mask = np.zeros(intensities.shape, bool)
    mask[2:10, 2:10, 2:10] = True
    normalised = head.fit_normalisation(intensities, mask).apply(intensities)
    assert np.median(normalised[mask]) == pytest.approx(MEDIAN, abs=1e-6)
    assert head.DARKEST == DARKEST
    fitted = fit_baselines(cases(volumes(0)), MODALITIES)
    for image in predict_baselines(fitted, MODALITIES, of(volumes(1)), TARGETS)["constant"]:
        np.testing.assert_array_equal(image, np.float32(MEDIAN))


def test_masked_voxels_are_not_fitted_to():
    """Whatever is masked in a source or in the target, the line through the rest is the same."""
    whole, masked = volumes(0), volumes(0)
    for modality, chosen in {"t1n": np.s_[:2], "t1c": np.s_[:, 5:], "t2f": np.s_[:, :, :1]}.items():
        masked[modality] = masked[modality].copy()
        masked[modality][chosen] = 0
    fitted = fit_baselines(cases(masked), MODALITIES)
    np.testing.assert_allclose(weights(fitted), weights(fit_baselines(cases(whole), MODALITIES)), atol=1e-5)
    assert fitted["gram"][0, -1, -1] == 4 * 5 * 7  # voxels in which all four have an intensity


def test_where_all_sources_are_masked_nothing_is_predicted():
    given = of(volumes(1))
    given["t1n"][:3] = 0
    given["t2w"][:2] = 0
    for images in predict_baselines(fit_baselines(cases(volumes(0)), MODALITIES), MODALITIES, given, TARGETS).values():
        for image in images:
            assert not image[:2].any()
            assert image[2:].min() >= DARKEST


def test_the_mean_image_keeps_its_orientation():
    z, y, x = np.meshgrid(np.linspace(0, 1, 12), np.linspace(0, 1, 16), np.linspace(0, 1, 20), indexing="ij")
    ramp = (0.5 * z + 0.3 * y + 0.1 * x).astype(np.float32)
    fitted = fit_baselines(cases({"t1n": ramp, "t1c": ramp}), ("t1n", "t1c"))
    (image,) = predict_baselines(fitted, ("t1n", "t1c"), {"t1n": ramp}, ("t1c",))["mean image"]
    assert np.abs(image - ramp).max() < 0.05


@pytest.mark.parametrize("shape", [(1, 1, 1), (155, 3, 2), (48, 64, 64)])
def test_every_baseline_fits_every_head(shape):
    fitted = fit_baselines(cases(volumes(0)), MODALITIES)
    predicted = predict_baselines(fitted, MODALITIES, of(volumes(3, shape)), TARGETS)
    assert tuple(predicted) == BASELINES
    for images in predicted.values():
        assert len(images) == len(TARGETS)
        for image in images:
            assert (image.shape, image.dtype) == (shape, np.float32)
            assert image.min() >= DARKEST
            assert image.max() <= 1


def test_predictions_are_clipped():
    ramp = np.array([[[0.1, 0.3, 1.0]]], np.float32)
    fitted = {
        **fit_baselines(cases({"t1n": ramp[..., :2], "t1c": 2 - 5 * ramp[..., :2]}), ("t1n", "t1c")),
        "mean_image": torch.full((2, *GRID), 7.0),
    }
    predicted = predict_baselines(fitted, ("t1n", "t1c"), {"t1n": ramp}, ("t1c",))
    np.testing.assert_allclose(predicted["linear regression"][0].ravel(), [1.0, 0.5, DARKEST], atol=1e-6)
    assert predicted["mean image"][0].max() == 1


def test_cases_that_lack_a_modality_are_left_out_only_where_it_matters():
    whole = volumes(0)
    no_target, no_source = volumes(1, without=("t1c",)), volumes(2, without=("t2w",))
    for case in (no_target, no_source):  # off the line, so that using them would show
        case["t2f"] = 1 - case["t2f"]
    alone = fit_baselines(cases(whole), MODALITIES)
    without_target = fit_baselines(cases(whole, no_target), MODALITIES)
    np.testing.assert_allclose(weights(without_target, [2]), weights(alone, [2]))
    torch.testing.assert_close(without_target["mean_image"][2], alone["mean_image"][2])
    assert np.abs(weights(without_target, [3]) - weights(alone, [3])).max() > 0.1
    without_source = fit_baselines(cases(whole, no_source), MODALITIES)
    np.testing.assert_allclose(weights(without_source), weights(alone))
    assert (without_source["mean_image"][3] - alone["mean_image"][3]).abs().max() > 0.01


@pytest.mark.parametrize("made", [[], [volumes(0, without=("t1c",))]])
def test_of_a_target_that_nobody_has_nothing_is_known(made):
    fitted = fit_baselines(cases(*made), MODALITIES)
    assert all(tensor.isfinite().all() for tensor in fitted.values())
    predicted = predict_baselines(fitted, MODALITIES, of(volumes(1)), TARGETS)
    assert list(predicted) == ["constant", "mean image"]  # no regression, which would be black
    for images in predicted.values():
        np.testing.assert_allclose(images[0], MEDIAN, atol=1e-4)


def test_a_regression_is_of_sources_that_a_patient_had_together_with_the_target():
    fitted = fit_baselines(cases(volumes(0, without=("t1c",)), volumes(1, without=("t2w",))), MODALITIES)
    unseen = volumes(2)
    assert linear_regression(fitted, MODALITIES, of(unseen), "t1c") is None
    for sources, target in ((("t1n",), "t1c"), (SOURCES, "t2f")):
        predicted = predict_baselines(fitted, MODALITIES, of(unseen, sources), [target])["linear regression"]
        np.testing.assert_array_equal(predicted[0], linear_regression(fitted, MODALITIES, of(unseen, sources), target))
    np.testing.assert_allclose(predicted[0], unseen["t2f"], atol=1e-5)
    assert "linear regression" not in predict_baselines(fitted, MODALITIES, of(unseen), TARGETS)


def test_constant_sources_do_not_break_the_fit():
    grey = {name: np.full((3, 3, 3), 0.2, np.float32) for name in SOURCES}
    fitted = fit_baselines(cases({**grey, "t1c": np.full((3, 3, 3), 0.5, np.float32)}), (*SOURCES, "t1c"))
    image = predict_baselines(fitted, (*SOURCES, "t1c"), grey, ("t1c",))["linear regression"][0]
    np.testing.assert_allclose(image, 0.5, atol=1e-6)


@pytest.mark.parametrize("sources", [("t1n",), ("t2w", "t1c"), ("t1n", "t2w", "t1c")])
def test_any_subset_gives_the_regression_of_the_cases_that_have_it(sources):
    rng = np.random.default_rng(1)
    made = [{m: rng.random((3, 4, 5)).astype(np.float32) for m in MODALITIES} for _ in range(4)]
    del made[0]["t1c"], made[1]["t2w"], made[2]["t2f"]
    usable = [case for case in made if {*sources, "t2f"} <= set(case)]
    columns = np.concatenate([np.stack([*(c[m].ravel() for m in sources), np.ones(60)], 1) for c in usable])
    want = np.linalg.lstsq(columns, np.concatenate([c["t2f"].ravel() for c in usable]), rcond=None)[0]
    fitted = fit_baselines(cases(*made), MODALITIES)
    np.testing.assert_allclose(linear_weights(fitted, [MODALITIES.index(m) for m in sources], 3), want, atol=1e-5)


def test_of_modalities_that_no_new_case_has_the_earlier_fit_stays():
    first = fit_baselines(cases(volumes(1), volumes(2, without=("t2w",))), MODALITIES)
    own = fit_baselines(cases(volumes(3, without=("t2w",)), volumes(4, without=("t2w", "t2f"))), MODALITIES)
    both = with_earlier(own, first)
    assert both["present"].tolist() == [[1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]]
    t1n, t1c = 0, 2
    np.testing.assert_array_equal(linear_weights(both, [t1n, 1], t1c), linear_weights(first, [t1n, 1], t1c))
    assert torch.equal(both["mean_image"][[0, 2, 3]], own["mean_image"][[0, 2, 3]])
    assert torch.equal(both["mean_image"][1], first["mean_image"][1])
    assert all(torch.equal(tensor, own[name]) for name, tensor in with_earlier(own, own).items())
