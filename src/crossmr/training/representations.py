"""What the finished networks say of each study: representations by the MRM, and samples of the MDN."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from crossmr.data.dataset import Case
from crossmr.device import autocast
from crossmr.networks.model import CrossConditionedModel
from crossmr.tensors import foreground_slices, seeded, to_model_input
from crossmr.training.batches import VectorBatch, present_in
from crossmr.training.shared import Training, in_chunks


@torch.no_grad()
def pooled_features(
    training: Training,
    model: CrossConditionedModel,
    cases: Sequence[Case],
    modalities: Sequence[str],
    *,
    until: float | None = None,
    every: int = 1,
) -> list[VectorBatch]:
    """Pooled features of each case, on the CPU: of every `every`-th slice with enough head (2D), or of the volume (3D).

    Of several processes each takes its turn with the next case, and all get the features of all cases. Ends early once
    the budget has spent more than `until` seconds.
    """
    cast(nn.Module, model.representation).eval()
    compute, ranks, features = training.compute, training.compute.ranks, []
    reader = training.batches("representation", cases, modalities, masked=True)
    with compute.display.task("represent", len(cases)) as task, autocast(compute.device, compute.dtype):
        for index, case in enumerate(cases):
            slices = foreground_slices(case.foreground_voxels)[::every]
            if index % ranks.size == ranks.rank:
                features.append(_pooled(training, model, reader.read(index, -1), slices))
            else:
                shape = len(slices) if training.config.spatial_dims == 2 else 1, len(modalities)
                width = training.config.representation.dim
                features.append(VectorBatch(torch.zeros(*shape, width), torch.zeros(shape)))
            task.advance()
            round_ends, last = (index + 1) % ranks.size == 0, index + 1 == len(cases)
            late = ranks.first and until is not None and training.budget.spent() > until  # by rank 0's clock
            if until is not None and round_ends and not last and ranks.any(late):
                compute.display.say(f"represent: no time for more than {index + 1} of {len(cases)} studies")
                break
    for part in features:
        ranks.all_reduce(*part)
    return features


def _pooled(training: Training, model: CrossConditionedModel, volumes: Tensor, slices: Sequence[int]) -> VectorBatch:
    """The features of some slices of a case's volumes (M, Z, Y, X), or of all of these in 3D."""
    compute, config = training.compute, training.config
    images = to_model_input(volumes, [[z] for z in slices], config.spatial_dims, config.divisor)

    def pool(some: slice) -> Tensor:
        return model.pooled(images[some].to(compute.device)).float().cpu()

    size = training.inference_batch_size(config.representation.channels, images.shape[2:], images.shape[1])
    return VectorBatch(torch.cat(in_chunks(pool, len(images), size)), present_in(images))


def draw_representations(training: Training, model: CrossConditionedModel, cases: Sequence[Case]) -> Tensor:
    """Samples of the MDN (cases, K, T·D), on the CPU, drawn for each patient exactly as completion does."""
    compute, config = training.compute, training.config
    cast(nn.Module, model.distribution).eval()
    conditions: list[Tensor | None] = [None] * len(cases)
    if config.distribution.conditional:
        features = pooled_features(training, model, cases, config.sources)
        available = [torch.tensor([[float(m in case.modalities) for m in config.sources]]) for case in cases]
        conditions = [
            model.condition(part.pooled.mean(0, keepdim=True), there)
            for part, there in zip(features, available, strict=True)
        ]
    shape = training.recipe.samples, len(config.targets) * config.representation.dim
    drawn = torch.zeros(len(cases), *shape)
    with compute.display.task("sample", len(cases)) as task:
        for index, (case, condition) in enumerate(zip(cases, conditions, strict=True)):
            if index % compute.ranks.size == compute.ranks.rank:
                generators = [seeded("drawn", compute.seed, case.name, k) for k in range(training.recipe.samples)]
                drawn[index] = model.draw(generators, condition).cpu()
            task.advance()
    compute.ranks.all_reduce(drawn)
    return drawn
