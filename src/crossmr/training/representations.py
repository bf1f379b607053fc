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
    """Of each case's slices with enough head (2D), or `every` so many, or of its volume (3D), on the CPU.

    Ends before the last case where the budget has spent more than `until`.
    """
    cast(nn.Module, model.representation).eval()
    compute, config, features = training.compute, training.config, []
    reader = training.batches("representation", cases, modalities, masked=True)
    with compute.display.task("represent", len(cases)) as task, autocast(compute.device, compute.dtype):
        for index, case in enumerate(cases):
            slices = foreground_slices(case.foreground_voxels)[::every]
            each = [[z] for z in slices]
            images = to_model_input(reader.read(index, -1), each, config.spatial_dims, config.divisor)

            def pool(some: slice, images: Tensor = images) -> Tensor:
                return model.pooled(images[some].to(compute.device)).float().cpu()

            at_once = training.at_once(config.representation.channels, images.shape[2:], len(modalities))
            features.append(VectorBatch(torch.cat(in_chunks(pool, len(images), at_once)), present_in(images)))
            task.advance()
            if until is not None and training.budget.spent() > until and index + 1 < len(cases):
                compute.display.say(f"represent: no time for more than {index + 1} of {len(cases)} studies")
                break
    return features


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
    drawn = []
    with compute.display.task("sample", len(cases)) as task:
        for case, condition in zip(cases, conditions, strict=True):
            generators = [seeded("drawn", compute.seed, case.name, k) for k in range(training.recipe.samples)]
            drawn.append(model.draw(generators, condition).cpu())
            task.advance()
    return torch.stack(drawn)
