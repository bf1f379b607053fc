"""Pre-training on scans without pairs: the C-UNet restores hidden patches of one scan at a time, in MRM's form."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from crossmr.data.dataset import Case
from crossmr.networks.c_unet import deviation_error, synthesis_error
from crossmr.networks.masked_autoencoder import random_mask
from crossmr.networks.model import CrossConditionedModel
from crossmr.networks.scale import standardise
from crossmr.ranks import ALONE, Shard
from crossmr.training.batches import ImageBatch
from crossmr.training.shared import Training
from crossmr.training.stages import DEVIATION_WEIGHT, SynthesisBatch, SynthesisStage

PATCH, HIDDEN = 16, 0.75
"""Side of a patch in pixels, and the fraction that is hidden."""


class Everything(Training):
    """A training that uses every case, those of one contrast as well."""

    def usable(self, cases: Sequence[Case], *, with_sources: bool = True) -> list[Case]:
        """All of them."""
        return list(cases)


class Restoring(SynthesisStage):
    """The C-UNet restores hidden patches of one scan at a time; in its batches `lesion` is 1 where they are hidden."""

    def __init__(self, training: Training, model: CrossConditionedModel):
        super().__init__(Everything(**{field.name: getattr(training, field.name) for field in fields(training)}), model)

    def batch(self, raw: ImageBatch, generator: torch.Generator, shard: Shard | None = None) -> SynthesisBatch:
        """Draw a scan of each sample, and its hidden patches."""
        shard = shard or ALONE.shard(len(raw.images))
        shape = (shard.whole, *raw.images.shape[2:])
        drawn = shard.of(torch.rand(shard.whole, raw.present.shape[1], generator=generator)) + raw.present
        shown = torch.nn.functional.one_hot(drawn.argmax(1), raw.present.shape[1]).float() * raw.present
        return SynthesisBatch(
            raw.neighbours, shown, raw.images, shown, shard.of(random_mask(shape, PATCH, HIDDEN, generator)), None
        )

    def loss(self, network: torch.nn.Module, batch: SynthesisBatch) -> tuple[Tensor, Tensor]:
        """The absolute error, and the likelihood of that error, in the hidden patches."""
        inputs = self.model.network_input(batch.neighbours, batch.available)
        inputs[:, :-1] *= 1 - batch.lesion  # all but the map of the head
        prediction, log_scale = self.model.split(network(inputs))
        truth = standardise(batch.truth)
        weight = (batch.truth > 0) * batch.target_mask[:, :, None, None] * batch.lesion
        error, count = synthesis_error(prediction, truth, weight, absolute=True)
        if log_scale is not None:
            error = error + DEVIATION_WEIGHT * deviation_error(log_scale, prediction, truth, weight)
        return error, count
