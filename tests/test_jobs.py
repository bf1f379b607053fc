"""What stages learn from: subsets that are proper and equally likely, and deviations that are likely, too."""

import numpy as np
import pytest
import torch

from crossmr import jobs
from crossmr.jobs import random_subsets


def test_subsets_are_proper_and_equally_likely():
    generator = torch.Generator().manual_seed(0)
    present = torch.tensor([[1.0, 1, 0, 1]]).expand(6000, -1)
    chosen = random_subsets(present, generator)
    assert not chosen[:, 2].any()
    codes = (chosen * torch.tensor([1.0, 2, 0, 4])).sum(1).long()
    counts = codes.bincount(minlength=8)
    assert counts[0] == counts[7] == 0
    assert (counts[1:7] - 1000).abs().max() < 150
    assert random_subsets(torch.tensor([[0.0, 1], [0, 0]]), generator).tolist() == [[0, 1], [0, 0]]
    whole = random_subsets(torch.ones(2000, 4), generator)
    assert len({tuple(row) for row in whole.tolist()}) == 14


def test_deviations_are_calibrated_by_their_likelihood():
    rng = np.random.default_rng(0)
    variance = rng.gamma(2, 0.01, 20_000)
    squared = rng.normal(0, np.sqrt(0.3 * variance + 0.004)) ** 2
    a, b = jobs._likeliest(torch.tensor(variance), torch.tensor(squared)).tolist()
    assert a == pytest.approx(0.3, rel=0.1)
    assert b == pytest.approx(0.004, rel=0.1)
    squared[:20] = 1.0  # a few gross errors, where little was said to be wrong
    variance[:20] = 1e-4
    a, b = jobs._likeliest(torch.tensor(variance), torch.tensor(squared)).tolist()
    assert 0.1 < a < 1
    exact = torch.zeros(100)  # errors that are none at all
    assert torch.isfinite(jobs._likeliest(torch.rand(100).double(), exact.double())).all()
