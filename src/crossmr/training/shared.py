"""What all stages of one training share: the studies, the recipe, the device, and how batches are cut and placed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from crossmr.data.dataset import Case
from crossmr.device import in_batches
from crossmr.display import Display
from crossmr.networks.model import ModelConfig
from crossmr.ranks import ALONE, Ranks
from crossmr.tensors import planes_of
from crossmr.training.batches import Batches, BatchSettings
from crossmr.training.memory import samples_at_once
from crossmr.training.plan import Budget
from crossmr.training.recipes import Recipe

Result = TypeVar("Result")
Batch = TypeVar("Batch", bound=tuple[Any, ...])

CHUNK = 16
"""Slices through a network at once, where no gradient is needed, and memory allows."""


@dataclass(frozen=True)
class Compute:
    """Where a training is computed, by which seed, who hears of it, and which processes share it."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    display: Display
    ranks: Ranks = ALONE

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the device, its 2D images channels last."""
        parts = []
        for tensor in batch:
            if tensor is not None:
                tensor = tensor.to(self.device, non_blocking=self.device.type == "cuda")  # of pinned memory
                if tensor.ndim == 4:
                    tensor = tensor.contiguous(memory_format=torch.channels_last)
            parts.append(tensor)
        return type(batch)(*parts)


def cut(batch: Batch, some: slice) -> Batch:
    """Some samples of a batch, a NamedTuple of tensors (B, ...) or None."""
    parts: list[Any] = [None if tensor is None else tensor[some] for tensor in batch]
    return type(batch)(*parts)


@dataclass(frozen=True)
class Training:
    """What every stage of one training shares."""

    folder: Path
    """The run's."""
    recipe: Recipe
    config: ModelConfig
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    compute: Compute
    budget: Budget

    def batches(self, stage: str, cases: Sequence[Case], modalities: Sequence[str], *, masked: bool = False) -> Batches:
        """The batches of a stage; images that are to be masked have no neighbours and are not augmented."""
        batch_size = self.recipe.train_config(stage).batch_size
        settings = BatchSettings(
            size=self.recipe.crop,
            batch_size=batch_size,
            shard=self.compute.ranks.shard(batch_size),
            seed=self.compute.seed,
            flip=self.recipe.flip,
            lesion_draws=1 if masked else self.recipe.lesion_draws,
            context=1 if masked else self.recipe.context_slices,
            augmentation=None if masked else self.recipe.augmentation,
            augmented=len(self.config.sources),
        )
        return Batches(cases, modalities, settings)

    def in_planes(self, cases: Sequence[Case]) -> list[Case]:
        """Each case as often as the C-UNet learns planes of it."""
        return [case.in_plane(p) for case in cases for p in planes_of(self.config.planes, case.spacing_mm[0])]

    def inference_batch_size(self, channels: int, sides: Sequence[int], images: int = 1) -> int:
        """Samples that pass through a network without gradients; see `samples_at_once`."""
        if self.compute.device.type != "cpu":
            return CHUNK
        return samples_at_once(channels, sides, images, CHUNK, self.compute.ranks.local_size)

    def usable(self, cases: Sequence[Case], *, with_sources: bool = True) -> list[Case]:
        """Cases that have any of the targets and all sources, or, for any subset, any two modalities."""
        needed = set(self.config.sources) if with_sources and not self.config.any_subset else set()
        least, targets = 1 + self.config.any_subset, set(self.config.targets)
        return [case for case in cases if needed <= (had := set(case.modalities)) and len(targets & had) >= least]


def in_chunks(
    function: Callable[[slice], Result], count: int, chunk: int = CHUNK, ranks: Ranks = ALONE
) -> list[Result]:
    """What `function` makes of this process's shard of `count` samples, `chunk` at once, fewer if memory runs out."""
    first, end, _ = ranks.shard(count)
    shifted = in_batches(lambda some: function(slice(first + some.start, first + some.stop)), end - first, chunk)
    return [result for _, result, _ in shifted]
