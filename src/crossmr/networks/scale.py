"""The two scales of an image: [0, 1], on which it is kept and shown, and the standardised one, which networks read.

Standardised intensities are robust standard deviations about the median within the head (data/head.py). On the
standardised scale 0 is that median, and what is missing; on [0, 1] exactly 0 is what is missing, and nothing else.
"""

import torch
from torch import Tensor

from crossmr.data.head import DARKEST, HIGHEST, LOWEST

RANGE = HIGHEST - LOWEST
"""Robust standard deviations from 0 to 1."""


def standardise(images: Tensor) -> Tensor:
    """Map [0, 1] to robust standard deviations about the head's median, in [-5, 10]; exact zeros stay 0."""
    return torch.where(images > 0, images * RANGE + LOWEST, 0)


def on_unit_scale(images: Tensor) -> Tensor:
    """Map robust standard deviations about the head's median to [DARKEST, 1]; what is beyond is cut off."""
    return ((images - LOWEST) / RANGE).clamp(DARKEST, 1)
