"""The scale of [0, 1] and the standardised one: each is the other's inverse, and only what is masked is outside."""

import numpy as np
import pytest
import torch

from crossmr.data.head import DARKEST, fit_normalisation
from crossmr.networks.scale import RANGE, on_unit_scale, standardise


def test_a_unit_image_is_in_robust_standard_deviations_about_the_median():
    images = torch.tensor([1 / 3, 1 / 3 + 1 / 15, 1.0, DARKEST])
    torch.testing.assert_close(standardise(images), torch.tensor([0.0, 1, 10, 15 * DARKEST - 5]), atol=1e-5, rtol=0)
    assert RANGE == 15


def test_only_exactly_0_is_outside():
    """What is outside is 0, as the median is, so that a median voxel has to be told from it by the first scale."""
    assert standardise(torch.tensor([0.0, -0.0])).tolist() == [0, 0]
    assert standardise(torch.tensor([torch.finfo(torch.float16).tiny])).item() == pytest.approx(-5, abs=1e-2)
    assert on_unit_scale(torch.tensor([0.0])).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 2, 4, 4, 4)])
def test_both_ways_give_back_the_image(shape):
    images = DARKEST + (1 - DARKEST) * torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_unit_scale(standardise(images)), images, atol=1e-6, rtol=0)


def test_what_is_beyond_the_scale_saturates_above_0():
    beyond = on_unit_scale(torch.tensor([-100.0, -5.0, 10.0, 100.0]))
    assert beyond.tolist() == [DARKEST, DARKEST, 1, 1]


def test_networks_read_volumes_of_median_0_and_robust_deviation_1():
    rng = np.random.default_rng(0)
    data = rng.gamma(20, 30, (8, 20, 20)).astype(np.float32)
    mask = np.ones(data.shape, bool)
    standardised = standardise(torch.from_numpy(fit_normalisation(data, mask).apply(data))).numpy()
    q25, median, q75 = np.percentile(standardised, (25, 50, 75))
    assert median == pytest.approx(0, abs=1e-4)
    assert (q75 - q25) / 1.349 == pytest.approx(1, abs=1e-4)
