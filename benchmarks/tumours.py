"""A segmenter of a tumour's regions, which segmenter.py trains, tests and applies.

MONAI's DynUNet (nnU-Net's form: two convolutions a level, instance normalisation, leaky ReLU) in 2D, on patches of
2 × 2 pixels that are gathered before its first layer and spread behind its last. It reads an axial slice of the four
contrasts, in robust standard deviations, 0 where one is missing, and a map of the head.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from grid import CROP, HOW, fit, network_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional as F

from crossmr.data.dataset import Case
from crossmr.data.labels import ENHANCING
from crossmr.device import autocast, choose_precision
from crossmr.display import Display
from crossmr.errors import ModelError
from crossmr.files import write_atomically
from crossmr.networks.model import first_weights
from crossmr.tensors import crop_or_pad, seeded, to_model_input
from crossmr.training.augmentation import AugmentationConfig
from crossmr.training.batches import Batches, BatchSettings
from crossmr.training.stages import random_subsets

CONTRASTS = ("t1n", "t1c", "t2w", "t2f")
REGIONS = ("WT", "TC", "ET")
"""Whole tumour, its core, its enhancing part: each within the one before."""
FILTERS = (48, 96, 192, 288)
BATCH = 16
WHOLE = 0.5
"""Share of a training's samples of which nothing is dropped, where contrasts are dropped at all."""
RECODED = {"modelhub_patient_1": (0, 2, 3, 1)}
"""Labels of the one study of other codes, by their intensities: 2 enhances, 3 is dark in T1ce, 1 is oedema."""
SMALLEST_MM3 = 500.0
"""Smaller pieces of a whole tumour are taken for errors."""
AGAIN = "skip_layers"
"""DynUNet holds its layers a second time under this name."""
FARTHEST_MM = 373.13
"""The diagonal of BraTS's grid: the distance where one of two regions is empty, as BraTS has it."""
Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class Segmenter(nn.Module):
    """Logits of WT, TC and ET from the four contrasts of axial slices and a map of the head."""

    def __init__(self, patch: int = 2, filters: Sequence[int] = FILTERS):
        from monai.networks.nets import DynUNet

        super().__init__()
        self.patch, self.filters, levels = patch, tuple(filters), len(filters)
        self.unet = DynUNet(
            spatial_dims=2,
            in_channels=(len(CONTRASTS) + 1) * patch**2,
            out_channels=len(REGIONS) * patch**2,
            kernel_size=[3] * levels,
            strides=[1] + [2] * (levels - 1),
            upsample_kernel_size=[2] * (levels - 1),
            filters=filters,
        )

    @property
    def divisor(self) -> int:
        """What the sides of slices are multiples of."""
        return int(self.patch * 2 ** (len(self.filters) - 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, 5, Y, X), see `network_inputs`, to logits (N, 3, Y, X)."""
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(inputs, self.patch)), self.patch)

    def features(self, inputs: Tensor) -> list[Tensor]:
        """The features of each level of the encoder, from the finest to the coarsest."""
        found = [F.pixel_unshuffle(inputs, self.patch)]
        for block in (self.unet.input_block, *self.unet.downsamples, self.unet.bottleneck):
            found.append(block(found[-1]))
        return found[1:]


class Labelled(Batches):
    """Crops whose `lesion` holds the labels as they were given, but for studies of other codes."""

    def _read_all(self, index: int, z: int) -> Tensor:
        labels = self._stored(index, z, 1)[1]
        if (codes := RECODED.get(self.cases[index].name)) is not None:
            labels = np.take(codes, labels)
        return torch.cat([self.read(index, z), torch.from_numpy(labels.astype(np.float32))[None]])


def regions(labels: Tensor) -> Tensor:
    """WT, TC and ET (N, 3, Y, X) of labels (N, 1, Y, X): 1 necrosis, 2 oedema, 3 or 4 enhancing."""
    enhancing = labels >= ENHANCING
    return torch.cat([labels > 0, (labels == 1) | enhancing, enhancing], 1).float()


def masks_of(labels: Labels) -> dict[str, Mask]:
    """Region → where it is, by labels of the same codes."""
    enhancing = labels >= ENHANCING
    return dict(zip(REGIONS, (labels > 0, (labels == 1) | enhancing, enhancing), strict=True))


class Lessons:
    """What a segmenter learns from, and its loss: soft Dice of the batch and binary cross-entropy of each region.

    MONAI's DiceCELoss would compare regions that overlap by a softmax.
    """

    def __init__(self, cases: Sequence[Case], seed: int, device: torch.device, *, dropping: bool):
        from monai.losses import DiceLoss

        settings = BatchSettings(
            size=CROP,
            batch_size=BATCH,
            seed=seed,
            lesion_draws=3,
            augmentation=AugmentationConfig(probability=0.15),
        )
        self.data, self.seed, self.device, self.dropping = Labelled(cases, CONTRASTS, settings), seed, device, dropping
        self.dice = DiceLoss(sigmoid=True, batch=True)

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """The loss of one batch; `dropping`, of half of its samples a random subset of the contrasts is shown."""
        batch = self.data[step]
        images = batch.neighbours
        if self.dropping:
            generator = seeded("dropped", self.seed, step)
            shown = random_subsets(batch.present, generator)
            whole = torch.rand(len(images), 1, generator=generator) < WHOLE
            images = images * torch.where(whole, batch.present, shown)[..., None, None]
        inputs = network_inputs(images, 1).to(self.device).contiguous(memory_format=torch.channels_last)
        truth, logits = regions(batch.lesion).to(self.device), network(inputs).float()
        return cast(Tensor, self.dice(logits, truth)) + F.binary_cross_entropy_with_logits(logits, truth)


def on(network: Segmenter, device: torch.device) -> Segmenter:
    """A network on a device, its weights as its slices are, channels last."""
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def new_segmenter(seed: int, patch: int, filters: Sequence[int], device: torch.device) -> Segmenter:
    """A segmenter that has learnt nothing."""
    with first_weights(seed, "segmenter"):
        network = Segmenter(patch, filters)
    return on(network, device)


def learn(network: Segmenter, lessons: Lessons, steps: int, name: str, display: Display) -> Segmenter:
    """Train a segmenter."""
    return cast(Segmenter, fit(network, lessons.loss, steps, HOW, name=name, display=display))


def keep(path: Path, network: Segmenter) -> None:
    """Write a segmenter as safetensors, its form in the file's metadata."""
    form = {"patch": str(network.patch), "filters": ",".join(map(str, network.filters))}
    named = {name: tensor for name, tensor in network.state_dict().items() if AGAIN not in name}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(save(tensors, form)))


def kept_segmenter(path: Path, device: torch.device) -> Segmenter:
    """Read a segmenter, ready for use."""
    with safe_open(path, "pt") as file:
        form = file.metadata()
    network = Segmenter(int(form["patch"]), [int(number) for number in form["filters"].split(",")])
    missing, unknown = network.load_state_dict(load_file(path), strict=False)
    if unknown or any(AGAIN not in name for name in missing):
        raise ModelError(f"{path} does not hold a segmenter of its form. Delete it, and train it again.")
    return on(network, device).eval().requires_grad_(False)


@torch.no_grad()
def segment(
    network: Segmenter, volumes: Mapping[str, Array], head: Mask, spacing_mm: Sequence[float] = (1, 1, 1)
) -> Labels:
    """Labels (Z, Y, X) of a head by its volumes in [0, 1]: 1 core, 2 oedema, 3 enhancing; what lacks is dropped."""
    device = next(network.parameters()).device
    dtype, empty = choose_precision("auto", device), np.zeros(head.shape, np.float32)
    whole = torch.stack([torch.from_numpy(volumes.get(m, empty)) for m in CONTRASTS])
    slices = [z for z, plane in enumerate(head) if plane.any()]
    labels = np.zeros(head.shape, np.uint8)
    for some in (slices[k : k + BATCH] for k in range(0, len(slices), BATCH)):
        inputs = network_inputs(to_model_input(whole, [[z] for z in some], 2, network.divisor), 1).to(device)
        with autocast(device, dtype):
            logits = network(inputs.contiguous(memory_format=torch.channels_last)).float().cpu()
        inside = (crop_or_pad(logits, head.shape[1:], [0.5] * 2) > 0).cumprod(1).numpy()  # each within the one before
        labels[some] = np.take((0, 2, 1, 3), inside.sum(1))
    labels[~head] = 0
    pieces, _ = ndimage.label(labels)
    small = np.bincount(pieces.ravel()) * np.prod(spacing_mm) < SMALLEST_MM3
    labels[small[pieces]] = 0
    return labels


def dice(truth: Mask, made: Mask) -> float:
    """The Dice coefficient; 1 where both are empty, as BraTS has it."""
    size = int(truth.sum()) + int(made.sum())
    return 2 * int((truth & made).sum()) / size if size else 1.0


def hausdorff_95(truth: Mask, made: Mask, spacing_mm: Sequence[float]) -> float:
    """The larger of both directions' 95th percentile of the distance from surface to surface, in mm."""
    if not truth.any() or not made.any():
        return 0.0 if truth.any() == made.any() else FARTHEST_MM
    (box,) = ndimage.find_objects((truth | made).astype(np.uint8))
    first, second = (np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing_mm for mask in (truth[box], made[box]))
    return max(
        float(np.percentile(KDTree(there).query(here)[0], 95)) for here, there in ((first, second), (second, first))
    )
