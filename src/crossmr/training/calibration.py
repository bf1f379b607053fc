"""What makes the standard deviations true: the variances that the C-UNet expects, held against validation patients."""

import math
from typing import Any, cast

import torch
from scipy.optimize import minimize
from torch import Tensor

from crossmr.device import autocast
from crossmr.networks.model import CrossConditionedModel, laplace_variance
from crossmr.networks.scale import standardise
from crossmr.tensors import seeded
from crossmr.training.shared import Training, cut, in_chunks
from crossmr.training.stages import VALIDATION_SLICES, SynthesisBatch, patterns, view


@torch.no_grad()
def calibration(
    training: Training, model: CrossConditionedModel, before: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """'variance' (T, 2), squared error = a·variance + b of each target, a, b >= 0, within validation patients' heads.

    Both are in squared robust standard deviations. By the Gaussian likelihood, for which a few large errors do not
    outweigh the rest. Where no validation patient has what it takes, it is that of `before`.
    """
    compute, config = training.compute, training.config
    known = before.get("variance") if before else None
    usable = training.usable(training.val)
    if not usable:
        return dict(before or {})
    model.eval()
    raw = training.batches("synthesis", usable, config.modalities).fixed(VALIDATION_SLICES)
    pairs: list[list[Tensor]] = [[] for _ in config.targets]
    for number in range(patterns(config)):
        batch = view(config, raw, None, seeded("calibrate", compute.seed, number))
        for chunk in _squared_errors(training, model, batch):
            for parts, part in zip(pairs, chunk, strict=True):
                parts.append(part)
    fitted = []
    for index, parts in enumerate(pairs):
        variance, squared = torch.cat(parts, 1)
        unknown = torch.tensor([1.0, 0.0]) if known is None else known[index].cpu()
        fitted.append(_likeliest(variance, squared) if len(variance) else unknown)
    return {"variance": torch.stack([pair.float() for pair in fitted])}


def _squared_errors(training: Training, model: CrossConditionedModel, batch: SynthesisBatch) -> list[list[Tensor]]:
    """Chunk by chunk, of each target, variances and squared errors (2, N) where it was acquired, float64 on the CPU."""

    def measure(some: slice) -> list[Tensor]:
        part = compute.place(cut(batch, some))
        inputs = model.inputs(part.neighbours, part.available)
        prediction, log_scale = model.predict(inputs)
        variance = laplace_variance(cast(Tensor, log_scale))
        squared = (prediction - standardise(part.truth)) ** 2
        both = torch.stack([variance, squared]).cpu().double()  # Apple's GPUs have no float64
        wanted = (batch.target_mask[some] > 0).unbind(1)
        there = (batch.truth[some] > 0).unbind(1)
        return [both[:, chosen, index][:, there[index][chosen]] for index, chosen in enumerate(wanted)]

    compute = training.compute
    with autocast(compute.device, compute.dtype):
        at_once = training.at_once(training.config.synthesis.channels, batch.truth.shape[2:])
        return in_chunks(measure, len(batch.truth), at_once)


def _likeliest(variance: Tensor, squared: Tensor) -> Tensor:
    """(a, b) under which squared errors (N,) are likeliest, if Gaussian of variance a·variance + b (N,)."""

    def cost(logs: Any) -> float:
        a, b = torch.from_numpy(logs).exp()
        fitted = a * variance + b
        return float((fitted.log() + squared / fitted).mean())

    floor = max(float(squared.mean()), 1e-12)
    first = [float((squared.mean() / variance.mean()).clamp(1e-6, 1e6).log()), math.log(floor * 1e-3)]
    return torch.from_numpy(minimize(cost, first, method="Nelder-Mead", options={"xatol": 1e-3}).x).exp()
