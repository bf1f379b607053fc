"""Batches of a prepared dataset: memory-mapped, and every batch a pure function of seed and step.

Because step N always gives the same batch, training resumes in the middle of an epoch with nothing to
restore, and neither worker processes nor the number of those that train together can change the result: each of these
draws the random numbers of the whole batch and reads its shard of the samples. (Sums over a head are rounded by the
number of threads: a changed image may differ by 1e-6.)
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossmr.data.dataset import Case
from crossmr.data.labels import ENHANCING
from crossmr.errors import SetError
from crossmr.ranks import ALONE, Shard
from crossmr.tensors import crop_or_pad, foreground_slices, neighbours, seeded
from crossmr.training.augmentation import Augmentation, AugmentationConfig, deform, draw_deformations

RawBatch = TypeVar("RawBatch", covariant=True)

FILES = 2**14
"""Open files that are counted on at most, where the system sets no limit."""


class StepDataset(Dataset[RawBatch], ABC, Generic[RawBatch]):
    """Batches by step: `data[step]`, for any step from 0 on, on the CPU."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Batches that use every item once."""

    @abstractmethod
    def __getitem__(self, step: int) -> RawBatch:
        """The batch of one step."""


class ImageBatch(NamedTuple):
    """Images as they are read, before anything is masked or hidden; float32 unless said."""

    images: Tensor
    """(B, M, *S) in [0, 1], M the modalities of the data; a modality that a patient lacks is zero."""
    present: Tensor
    """(B, M), 0 where the patient lacks the modality, or it was not acquired here: slices beyond its field of view
    are black throughout."""
    case: Tensor
    """int64 (B,), the index of each sample's case in the data."""
    neighbours: Tensor
    """(B, M·C, *S), of each modality the C slices whose middle one `images` holds, as a source: augmented, if asked."""
    lesion: Tensor
    """(B, 1, *S), 1 in voxels of a lesion by the study's labels, 2 in what enhances of it; 0 without labels."""


@dataclass(frozen=True)
class BatchSettings:
    """What a batch of images holds, and how it is drawn."""

    size: Sequence[int]
    """Sides of the crops: (Y, X) of slices, or (Z, Y, X)."""
    batch_size: int
    """Samples of a batch, over all processes that train together."""
    seed: int
    """Of the order, the crops, the flips and the augmentation."""
    flip: bool = True
    """Mirror samples left to right at random; sagittal ones have no sides."""
    lesion_draws: int = 1
    """How often a slice that has a lesion is drawn per epoch; every other is drawn once."""
    context: int = 1
    """Neighbouring axial slices of each sample, itself included."""
    augmentation: AugmentationConfig | None = None
    """What changes the neighbours; None for nothing."""
    augmented: int | None = None
    """How many of the first modalities are changed; None for all."""
    shard: Shard | None = None
    """Which samples of a batch are read here; None for all."""


class Batches(StepDataset[ImageBatch]):
    """Random crops: `batches[step]` is drawn from the seed and the step alone.

    Each epoch is a fresh permutation of all slices (2D; those with a lesion several times) or cases (3D); crops,
    left–right flips and the augmentation of the first `augmented` modalities are random.
    """

    def __init__(self, cases: Sequence[Case], modalities: Sequence[str], settings: BatchSettings):
        self.cases, self.modalities, self.context = tuple(cases), tuple(modalities), settings.context
        self.size, self.batch_size = tuple(settings.size), settings.batch_size
        self.seed, self.flip, augmentation = settings.seed, settings.flip, settings.augmentation
        self.shard = settings.shard or ALONE.shard(settings.batch_size)
        self.augmented = len(self.modalities) if settings.augmented is None else settings.augmented
        self.augment = None
        self.deformation = augmentation if augmentation is not None and augmentation.deformation > 0 else None
        if augmentation is not None and augmentation.probability > 0:
            self.augment = Augmentation(augmentation, len(self.size))
        self.items = [(i, -1) for i, _ in enumerate(self.cases)]
        if len(self.size) == 2:
            self.items = [(i, z) for i, case in enumerate(cases) for z in foreground_slices(case.foreground_voxels)]
        self.epoch_items = [
            (i, z) for i, z in self.items for _ in range(times_drawn(self.cases[i], z, settings.lesion_draws))
        ]
        if not self.items:
            raise SetError(
                f"No study of the set can serve this training, which needs {', '.join(self.modalities)}. "
                "Prepare more patients, or choose other --sources and --targets."
            )
        self._mapped: dict[int, tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but the mapped images, which another process maps again."""
        return {**self.__dict__, "_mapped": {}}

    @property
    def steps_per_epoch(self) -> int:
        """Batches that see every item once."""
        return -(-len(self.epoch_items) // self.batch_size)

    def __getitem__(self, step: int) -> ImageBatch:
        """The batch of one step."""
        first, count = step * self.batch_size, len(self.epoch_items)
        positions = range(first + self.shard.start, first + self.shard.stop)
        orders = {epoch: self._order(epoch) for epoch in {p // count for p in positions}}
        chosen = [self.epoch_items[int(orders[p // count][p % count])] for p in positions]
        generator = seeded("batch", self.seed, step)
        places = self.shard.of(torch.rand(self.batch_size, len(self.size) + 1, generator=generator)).tolist()
        samples = [self._sample(*both) for both in zip(chosen, places, strict=True)]
        if self.deformation is not None:
            drawn = draw_deformations(self.deformation, self.batch_size, len(self.size), generator)
            spacings = [self.cases[index].spacing_mm[-len(self.size) :] for index, _ in chosen]
            samples = [deform(*one) for one in zip(samples, self.shard.of(drawn).tolist(), spacings, strict=True)]
        batch = self._batch(samples, chosen)
        return batch if self.augment is None else self._augmented(batch, self.augment, generator)

    def _augmented(self, batch: ImageBatch, augment: Augmentation, generator: torch.Generator) -> ImageBatch:
        """The batch as other scanners might have given its sources."""
        sources = batch.neighbours.reshape(len(batch.images), len(self.modalities), -1, *self.size).clone()
        for index in range(-self.shard.start, self.shard.whole - self.shard.start):
            for channel in range(self.augmented):
                drawn = augment.draw(generator)
                if 0 <= index < len(sources):
                    sources[index, channel] = augment.change(sources[index, channel], *drawn)
        return batch._replace(neighbours=sources.flatten(1, 2))

    def validation_batch(self, count: int) -> ImageBatch:
        """Up to `count` items spread evenly, cropped in the middle, never flipped: for validation."""
        picked = np.linspace(0, len(self.items) - 1, min(count, len(self.items))).round().astype(int)
        chosen = [self.items[int(i)] for i in picked]
        middle = [0.5] * len(self.size)
        return self._batch([crop_or_pad(self._read_all(*item), self.size, middle) for item in chosen], chosen)

    def read(self, index: int, z: int) -> Tensor:
        """One slice (M[, context], Y, X), or, z being -1, a volume (M, Z, Y, X); float32 in [0, 1], 0 where missing."""
        return self.cases[index].channels(self._stored(index, z, 0), self.modalities)

    def _read_all(self, index: int, z: int) -> Tensor:
        """What `read` reads, and behind it, as one modality more, 1 in a lesion and 2 in what enhances of it."""
        image = self.read(index, z)
        lesion = torch.zeros(1, *image.shape[1:])
        if self.cases[index].has_labels:
            labels = self._stored(index, z, 1)[1]
            lesion[0] = torch.from_numpy((labels > 0) + (labels >= ENHANCING).astype(np.float32))
        return torch.cat([image, lesion])

    def _stored(self, index: int, z: int, array: int) -> npt.NDArray[Any]:
        """One slice (M[, context], Y, X) of a case's images (array 0) or masks (1), or a volume (M, Z, Y, X)."""
        if index not in self._mapped:
            if len(self._mapped) >= mapped_at_once():
                del self._mapped[next(iter(self._mapped))]
            self._mapped[index] = self.cases[index].images(), self.cases[index].masks()
        mapped: npt.NDArray[Any] = self._mapped[index][array]
        if z >= 0 and self.context == 1:
            one: npt.NDArray[Any] = mapped[z]
            return one
        chosen = slice(None) if z < 0 else neighbours(z, self.context, len(mapped), self.cases[index].spacing_mm[0])
        return mapped[chosen].transpose(1, 0, 2, 3)

    def _batch(self, samples: Sequence[Tensor], chosen: Sequence[tuple[int, int]]) -> ImageBatch:
        whole = torch.stack(list(samples))  # (B, M + 1[, C], *S)
        middle = whole if self.context == 1 else whole[:, :, self.context // 2]
        images, lesion = middle[:, :-1], middle[:, -1:]
        surrounding = images if self.context == 1 else whole[:, :-1].flatten(1, 2)
        return ImageBatch(images, present_in(images), torch.tensor([i for i, _ in chosen]), surrounding, lesion)

    def _sample(self, item: tuple[int, int], place: Sequence[float]) -> Tensor:
        """An item, cropped where `place` says, and, by its last number, mirrored."""
        image = self._read_all(*item)
        *offset, coin = place
        image = crop_or_pad(image, self.size, offset)
        sides = self.cases[item[0]].plane != "sagittal"  # whose columns do not run from left to right
        return image.flip(-1) if self.flip and sides and coin < 0.5 else image

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.epoch_items), generator=seeded("epoch", self.seed, epoch))


def mapped_at_once() -> int:
    """Cases whose arrays stay mapped, each of them two open files: half of what may be open (ulimit -n)."""
    if sys.platform == "win32":
        return 64
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (FILES if limit in (0, resource.RLIM_INFINITY) else min(limit, FILES)) // 4


def times_drawn(case: Case, z: int, lesion_draws: int) -> int:
    """How often a slice is drawn per epoch, or, z being -1, a volume."""
    voxels = case.lesion_voxels
    return lesion_draws if z >= 0 and voxels and voxels[z] > 0 else 1


def present_in(images: Tensor) -> Tensor:
    """Which images of (B, M, *S) are not black throughout, (B, M) of zeros and ones."""
    return (images.flatten(2).amax(-1) > 0).float()


class VectorBatch(NamedTuple):
    """Pooled features as the masked autoencoder gives them."""

    pooled: Tensor
    """(B, M, D), of the modalities that it represents."""
    present: Tensor
    """(B, M), 0 where the patient lacks the modality, or it was not acquired in this slice."""


class Vectors(StepDataset[VectorBatch]):
    """Batches of vectors held in memory, drawn from the seed and the step alone."""

    def __init__(self, vectors: VectorBatch, batch_size: int, seed: int, shard: Shard | None = None):
        self.vectors, self.batch_size, self.seed = vectors, batch_size, seed
        self.shard = shard or ALONE.shard(batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that see, on average, every vector once."""
        return -(-len(self.vectors.pooled) // self.batch_size)

    def __getitem__(self, step: int) -> VectorBatch:
        """The batch of one step."""
        generator = seeded("vectors", self.seed, step)
        chosen = self.shard.of(torch.randint(len(self.vectors.pooled), (self.batch_size,), generator=generator))
        return VectorBatch(self.vectors.pooled[chosen], self.vectors.present[chosen])
