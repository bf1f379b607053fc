"""How like a real image's the texture of a synthetic one is: power spectrum, a network's eye, invented bright areas."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from grid import Row
from scipy import ndimage, stats
from torch import Tensor, nn

from crossmr.evaluation.subjects import Array, Mask, Subject
from crossmr.networks.model import first_weights
from crossmr.networks.scale import standardise
from crossmr.tensors import seeded

BANDS = {"power_low": (0.03, 0.1), "power_middle": (0.1, 0.25), "power_high": (0.25, 0.45)}
"""Cycles per millimetre."""
FINEST = 0.48
"""Cycles per voxel, along rows or columns: from here on lies the grid of a network of patches of 2 x 2."""
SIDE = 64
"""Of a patch, in voxels."""
BRIGHT, SURELY_NOT, SMALLEST = 3.0, 1.5, 50
"""Robust standard deviations above the median; a bright area has so many voxels."""
GREY_LEVEL = 0.06
"""Robust standard deviations from one grey level of a real scan to the next, where these are few."""
TELLING = 300
"""Steps in which a network learns to tell synthetic from real."""


def places(head: Mask) -> list[tuple[int, int, int]]:
    """Corners (z, y, x) of patches that lie within the head, in every fourth slice."""
    z_end, y_end, x_end = head.shape
    step = SIDE // 2
    corners = [
        (z, y, x)
        for z in range(0, z_end, 4)
        for y in range(0, y_end - SIDE + 1, step)
        for x in range(0, x_end - SIDE + 1, step)
    ]
    return [(z, y, x) for z, y, x in corners if head[z, y : y + SIDE, x : x + SIDE].mean() >= 0.95]


def patches(volume: Array, at: Sequence[tuple[int, int, int]]) -> Tensor:
    """Patches (P, SIDE, SIDE) of a volume in [0, 1], standardised."""
    cut = [torch.from_numpy(volume[z, y : y + SIDE, x : x + SIDE].astype(np.float32)) for z, y, x in at]
    return standardise(torch.stack(cut)) if cut else torch.zeros(0, SIDE, SIDE)


def band_power(cut: Tensor, spacing_mm: float) -> dict[str, float]:
    """The power of patches (P, SIDE, SIDE) in each band and in `power_grid`, by Hann-windowed Fourier transforms."""
    window = torch.outer(*[torch.hann_window(SIDE, periodic=False)] * 2)
    power = torch.fft.fft2((cut - cut.mean((1, 2), keepdim=True)) * window).abs().square().mean(0)
    frequency = torch.fft.fftfreq(SIDE, spacing_mm)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    finest = torch.fft.fftfreq(SIDE).abs() >= FINEST
    grid = power[finest[:, None] | finest[None]].sum()
    bands = {name: power[(radius >= low) & (radius < high)].sum() for name, (low, high) in BANDS.items()}
    return {name: float(total) for name, total in {**bands, "power_grid": grid}.items()}


def invented_ml(truth: Array, synthetic: Array, head: Mask, spacing_mm: Sequence[float]) -> float:
    """Millilitres of bright areas of a synthetic volume whose voxels are mostly not bright in the true one."""
    true, made = (standardise(torch.from_numpy(v.astype(np.float32))).numpy() for v in (truth, synthetic))
    areas, count = ndimage.label((made > BRIGHT) & head)
    numbers = np.arange(1, count + 1)
    sizes, wrong = ndimage.sum_labels(head, areas, numbers), ndimage.mean(true < SURELY_NOT, areas, numbers)
    return float(np.sum(sizes[(sizes >= SMALLEST) & (wrong > 0.5)]) * np.prod(spacing_mm) / 1000) if count else 0.0


def texture_row(subject: Subject, target: str, synthetic: Array) -> Row:
    """Power and bright areas of one image, against the true ones."""
    truth, at = subject.volumes[target], places(subject.head)
    row: Row = {}
    if at:
        made, true = (band_power(patches(v, at), subject.spacing_mm[1]) for v in (synthetic, truth))
        row |= {name: made[name] / true[name] for name in made}
    if target == "t2f":
        row["invented_ml"] = invented_ml(truth, synthetic, subject.head, subject.spacing_mm)
    return row


def without_levels(cut: Tensor, *key: object) -> Tensor:
    """Patches with noise of a grey level's size, so that not the levels tell real ones from synthetic ones."""
    return cut + GREY_LEVEL * torch.randn(cut.shape, generator=seeded("grey levels", *key))


def telling_apart(pairs: Sequence[tuple[Tensor, Tensor]], steps: int, seed: int) -> nn.Module:
    """A small network that tells real patches from synthetic ones, (real, synthetic) of each study."""
    widths, layers = (1, 16, 32, 64, 64), []
    with first_weights(seed, "telling apart"):
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))
    kinds = [torch.cat(kind) for kind in zip(*pairs, strict=True)]
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    answers = torch.tensor([1.0] * 16 + [0.0] * 16)
    for step in range(steps):
        generator = seeded("telling apart", seed, step)
        chosen = [kind[torch.randint(len(kind), (16,), generator=generator)] for kind in kinds]
        images = torch.cat(chosen)[:, None]
        images = images.flip(-1) if step % 2 else images
        optimiser.zero_grad(set_to_none=True)
        nn.functional.binary_cross_entropy_with_logits(network(images)[:, 0], answers).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network.eval()


@torch.no_grad()
def area(network: nn.Module, real: Tensor, synthetic: Tensor) -> float:
    """The area under the ROC curve of a network on one study's patches."""
    scores = [network(kind[:, None])[:, 0].numpy() for kind in (real, synthetic)]
    return float(stats.mannwhitneyu(*scores).statistic / (len(real) * len(synthetic)))
