"""The predictors of rivals.py, and those of them that regress: network, loss, and how a study is completed.

All read T1, T1ce and T2 and give FLAIR, standardised, and learn within the head. Those of slices read three
neighbouring ones of each source and a map of the head. Networks come from crossmr and from MONAI; losses and samplers
are written from the papers that their classes name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from grid import CROP, THREE, Predict, batches, by_slices, network_inputs
from monai.inferers import sliding_window_inference
from monai.networks.nets import DynUNet
from monai.networks.nets.restormer import Restormer
from torch import Tensor, nn

from crossmr.data.dataset import Case
from crossmr.device import autocast, choose_precision
from crossmr.evaluation.subjects import Array, Subject
from crossmr.networks.c_unet import CUNet, SynthesisConfig, synthesis_error
from crossmr.networks.model import first_weights
from crossmr.networks.scale import on_unit_scale, standardise
from crossmr.training.batches import Batches, ImageBatch

SOURCES, TARGETS = THREE
CONTEXT, BATCH, DIVISOR = 3, 4, 32
CHANNELS = CONTEXT * len(SOURCES) + 1
OURS = SynthesisConfig(channels=48, multipliers=(1, 2, 4, 6), patch=2, form="light")
PUBLISHED = SynthesisConfig(channels=32)
"""Recipe paper's form, a third as wide, so that it sees about as many slices as DynUNet; at its own, a tenth."""
WINDOW = 64, 96, 96
VALIDATION = 24
"""Slices of the validation patients on which rates are compared; windows in 3D: a quarter of it."""
Images = dict[str, Array]


class Sample(NamedTuple):
    """What a network learns from."""

    inputs: Tensor
    """(B, C, *S), see `grid.network_inputs`."""
    truth: Tensor
    """(B, T, *S), standardised."""
    weight: Tensor
    """(B, T, *S), 1 within the head where the target was acquired."""


class Rival:
    """Regression of slices by the absolute error; the other predictors change what differs."""

    name: ClassVar[str]
    rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)
    """Learning rates that are tried."""
    context: ClassVar[int] = CONTEXT
    absolute: ClassVar[bool] = True
    layout: ClassVar[torch.memory_format] = torch.channels_last
    """Of features in memory."""
    period: ClassVar[int] = 1
    """Steps after which the shapes of a batch repeat."""
    slow: ClassVar[bool] = False
    """Whether it completes the `chosen` slices only."""
    chosen: slice = slice(None)

    def __init__(self, train: Sequence[Case], val: Sequence[Case], *, seed: int, rate: float, device: torch.device):
        self.seed, self.rate, self.device = seed, rate, device
        with first_weights(seed, self.name):
            self.network = self.build().to(device)
        self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.training, self.validation = self.data(train), self.data(val)

    @property
    def partly(self) -> bool:
        """Whether some slices stay empty."""
        return self.slow and (self.chosen.step or 1) > 1

    def build(self) -> nn.Module:
        """The network, with its first weights."""
        raise NotImplementedError

    def data(self, cases: Sequence[Case]) -> Sequence[Batches]:
        """Where batches come from, in turn."""
        return [batches(cases, [*SOURCES, *TARGETS], self.seed, batch_size=BATCH)]

    def sample(self, batch: ImageBatch) -> Sample:
        """A batch as networks read it."""
        count = len(SOURCES)
        inputs = network_inputs(batch.neighbours[:, : count * self.context], self.context)
        truth = batch.images[:, count:]
        sample = Sample(inputs, standardise(truth), (truth > 0) * inputs[:, -1:])
        return Sample(*(tensor.to(self.device).contiguous(memory_format=self.layout) for tensor in sample))

    def draw(self, step: int) -> Sample:
        """The batch of a step."""
        turn = len(self.training)
        return self.sample(self.training[step % turn][step // turn])

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """The mean error within the head."""
        inputs, truth, weight = self.draw(step)
        total, count = synthesis_error(network(inputs), truth, weight, absolute=self.absolute)
        return total / count.clamp(min=1)

    def predict(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Images (N, T, *S) of inputs, standardised."""
        images: Tensor = network(inputs.contiguous(memory_format=self.layout))
        return images

    @torch.no_grad()
    def validate(self, network: nn.Module, count: int = VALIDATION) -> float:
        """The mean absolute error within the head, in robust standard deviations, of fixed slices."""
        sums = torch.zeros(2, dtype=torch.float64)
        for data in self.validation:
            whole = self.sample(data.validation_batch(max(1, count // len(self.validation))))
            for inputs, truth, weight in zip(*(torch.split(part, BATCH) for part in whole), strict=True):
                with autocast(self.device, choose_precision("auto", self.device)):
                    images = self.predict(network, inputs)
                sums += torch.stack(synthesis_error(images, truth, weight, absolute=True)).double().cpu()
        return float(sums[0] / sums[1])

    def completions(self, network: nn.Module) -> Mapping[str, Callable[[Subject], Images]]:
        """Predictor → how it completes a study; more than one where one network serves several."""
        return {self.name: partial(self.complete, partial(self.predict, network))}

    def complete(self, predict: Predict, subject: Subject) -> Images:
        """Target → volume (Z, Y, X) in [0, 1]."""
        return by_slices(subject, SOURCES, TARGETS, predict, context=CONTEXT, divisor=DIVISOR, device=self.device)


def some_slices(subject: Subject, chosen: slice) -> Subject:
    """A study of some of its slices."""
    z, y, x = subject.spacing_mm
    return replace(
        subject,
        volumes={m: volume[chosen] for m, volume in subject.volumes.items()},
        head=subject.head[chosen],
        tumour=subject.tumour[chosen],
        enhancing=subject.enhancing[chosen],
        spacing_mm=(z * (chosen.step or 1), y, x),
    )


class Ours(Rival):
    """The C-UNet of recipe standard: light form, patches of 2 x 2, three slices, absolute error."""

    name = "ours"

    def build(self) -> nn.Module:
        """7.2 M parameters."""
        return CUNet(OURS, CHANNELS, len(TARGETS))

    def completions(self, network: nn.Module) -> Mapping[str, Callable[[Subject], Images]]:
        """As it is; and the mean of that and what it makes of the study mirrored left to right, mirrored back."""
        predict = partial(self.predict, network)

        def both(inputs: Tensor) -> Tensor:
            return (predict(inputs) + predict(inputs.flip(-1)).flip(-1)) / 2

        mirrored = {f"mirror images, too: {self.name}": partial(self.complete, both)} if type(self) is Ours else {}
        return {**super().completions(network), **mirrored}


class PublishedForm(Rival):
    """The C-UNet of recipe paper without guidance: every pixel by itself, squared error (Xing et al. 2024)."""

    name, absolute = "published form, unguided", False

    def build(self) -> nn.Module:
        """A third as wide as published."""
        return CUNet(PUBLISHED, CHANNELS, len(TARGETS))


def dyn_unet(dims: int, inputs: int, filters: Sequence[int]) -> nn.Module:
    """MONAI's form of nnU-Net (Isensee et al. 2021)."""
    strides, kernels = [1] + [2] * (len(filters) - 1), [3] * len(filters)
    network: nn.Module = DynUNet(dims, inputs, len(TARGETS), kernels, strides, strides[1:], filters=filters)
    return network


class DynUNet2D(Rival):
    """Plain regression of slices by nnU-Net's U-Net."""

    name = "DynUNet 2D"

    def build(self) -> nn.Module:
        """nnU-Net's widths, five levels."""
        return dyn_unet(2, CHANNELS, [32, 64, 128, 256, 320])


class DynUNet3D(Rival):
    """The same of volumes, completed window by window."""

    name, context, layout = "DynUNet 3D", 1, torch.contiguous_format

    def build(self) -> nn.Module:
        """Half of nnU-Net's widths."""
        return dyn_unet(3, len(SOURCES) + 1, [16, 32, 64, 128, 160])

    def data(self, cases: Sequence[Case]) -> Sequence[Batches]:
        """One window at a time."""
        names = [*SOURCES, *TARGETS]
        return [batches(cases, names, self.seed, size=WINDOW, batch_size=1, context=1)]

    def validate(self, network: nn.Module, count: int = VALIDATION) -> float:
        """The same of the middle of each patient."""
        return super().validate(network, max(1, count // 4))

    @torch.no_grad()
    def complete(self, predict: Predict, subject: Subject) -> Images:
        """By windows that overlap by a quarter."""
        volumes = torch.stack([torch.from_numpy(subject.volumes[m]) for m in SOURCES])
        inputs = network_inputs(volumes[None], 1).to(self.device)
        with autocast(self.device, choose_precision("auto", self.device)):
            made: Any = sliding_window_inference(inputs, WINDOW, 1, predict, overlap=0.25, mode="gaussian")
        images = on_unit_scale(made[0].float().cpu()).numpy() * subject.head
        return dict(zip(TARGETS, images, strict=True))


VIEWS: dict[str, tuple[tuple[int, int, int], tuple[int, int]]] = {
    "axial": ((0, 1, 2), CROP),
    "coronal": ((1, 0, 2), (160, 160)),
    "sagittal": ((2, 0, 1), (160, 192)),
}
"""View → the order of its axes, slices first, by their numbers in (Z, Y, X); and its crops."""


@dataclass(frozen=True)
class Turned(Case):
    """A study whose slices are those of another view."""

    original: Case | None = None
    order: tuple[int, int, int] = (0, 1, 2)

    def images(self) -> npt.NDArray[np.float16]:
        """As `Case.images`, axes in this view's order."""
        assert self.original is not None
        return self.original.images().transpose(self._axes)

    def masks(self) -> npt.NDArray[np.uint8]:
        """As `Case.masks`."""
        assert self.original is not None
        return self.original.masks().transpose(self._axes)

    @property
    def _axes(self) -> tuple[int, ...]:
        first, *rest = ((0, 2, 3)[axis] for axis in self.order)
        return first, 1, *rest


def turned(case: Case, order: tuple[int, int, int]) -> Turned:
    """A study in the view of this order."""
    view = Turned(**vars(case), original=case, order=order)
    counts = (np.asarray(view.masks()) > 0).sum((2, 3)).tolist()
    a, b, c = order
    return replace(
        view,
        foreground_voxels=tuple(head for head, _ in counts),
        lesion_voxels=tuple(lesion for _, lesion in counts) if case.has_labels else (),
        spacing_mm=(case.spacing_mm[a], case.spacing_mm[b], case.spacing_mm[c]),
        shape=(case.shape[a], case.shape[b], case.shape[c]),
    )


class ThreeViews(Ours):
    """YODA's form of regression: one network of slices in three views, whose three volumes are averaged.

    The network is ours, so that the views alone differ.
    """

    name, period = "three views (YODA's form)", 3

    def data(self, cases: Sequence[Case]) -> Sequence[Batches]:
        """The views in turn; mirrored left to right where a slice has both sides."""
        names = [*SOURCES, *TARGETS]
        return [
            batches([turned(case, order) for case in cases], names, self.seed, batch_size=BATCH, size=size, flip=flip)
            for (order, size), flip in zip(VIEWS.values(), (True, True, False), strict=True)
        ]

    def completions(self, network: nn.Module) -> Mapping[str, Callable[[Subject], Images]]:
        """The mean of the three views, and each by itself."""
        predict = partial(self.predict, network)
        alone = {f"{view} slices of {self.name}": partial(self.seen_in, predict, (view,)) for view in VIEWS}
        return {self.name: partial(self.seen_in, predict, tuple(VIEWS)), **alone}

    def seen_in(self, predict: Predict, views: Sequence[str], subject: Subject) -> Images:
        """The mean of some views."""
        sums = {target: np.zeros(subject.head.shape, np.float32) for target in TARGETS}
        for order in (VIEWS[view][0] for view in views):
            a, b, c = order
            seen = replace(
                subject,
                volumes={m: np.ascontiguousarray(v.transpose(order)) for m, v in subject.volumes.items()},
                head=subject.head.transpose(order),
                spacing_mm=(subject.spacing_mm[a], subject.spacing_mm[b], subject.spacing_mm[c]),
            )
            for target, volume in self.complete(predict, seen).items():
                sums[target] += volume.transpose(np.argsort(order)) / len(views)
        return sums


class ThreeAxial(Ours):
    """The control of three views: the mean of three networks of axial slices, which learn in turn."""

    name = "three axial networks"

    def build(self) -> nn.Module:
        """Three networks, with first weights of their own."""
        return nn.ModuleList([super(ThreeAxial, self).build() for _ in VIEWS])

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """The error of the one whose turn it is."""
        one = cast(nn.ModuleList, network)[step % len(VIEWS)]
        return super().loss(one, step)

    def predict(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """The mean of the three."""
        return torch.stack([super(ThreeAxial, self).predict(one, inputs) for one in network.children()]).mean(0)


class RestormerSmall(Rival):
    """MONAI's Restormer (Zamir et al. 2022), narrow and shallow."""

    name = "Restormer"

    def build(self) -> nn.Module:
        """Half of the published width, of blocks a third."""
        blocks, heads = (1, 2, 2, 3), (1, 2, 4, 8)
        network: nn.Module = Restormer(2, CHANNELS, len(TARGETS), 24, blocks, heads, num_refinement_blocks=1)
        return network
