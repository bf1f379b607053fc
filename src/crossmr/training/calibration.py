"""What makes the standard deviations true: the variances that the C-UNet expects, held against validation patients."""

import math
from typing import Any, cast

import torch
from scipy.optimize import minimize
from torch import Tensor

from crossmr.device import autocast
from crossmr.networks.model import INHERITED, CrossConditionedModel, calibrated_on, laplace_variance
from crossmr.networks.scale import standardise
from crossmr.tensors import seeded
from crossmr.training.shared import Training, cut, in_chunks
from crossmr.training.stages import VALIDATION_SLICES, SynthesisBatch, synthesis_batch, validation_views


@torch.no_grad()
def calibration(
    training: Training, model: CrossConditionedModel, before: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """'variance' (T, 2): for each target a, c >= 0 of squared error = a·variance + c within validation patients' heads.

    Both are in squared robust standard deviations. By the Gaussian likelihood, for which a few large errors do not
    outweigh the rest. A target that no validation patient has keeps its pair of `before`, or else gets (1, 0).
    'patients' (T,): to how many validation patients' errors each pair was fitted; see `calibrated_on`. Of several
    processes each computes its shard of the errors, and rank 0 fits.
    """
    compute, config = training.compute, training.config
    known, earlier = before.get("variance") if before else None, calibrated_on(before or {}, config.targets)
    inherited = [INHERITED if earlier[target] != 0 else 0 for target in config.targets]
    usable = training.in_planes(training.usable(training.val))
    if not usable:
        return {} if known is None else {"variance": known, "patients": torch.tensor(inherited, dtype=torch.int32)}
    model.eval()
    raw = training.batches("synthesis", usable, config.modalities).validation_batch(VALIDATION_SLICES)
    pairs: list[list[Tensor]] = [[] for _ in config.targets]
    patients: list[set[str]] = [set() for _ in config.targets]
    for number in range(validation_views(config)):
        batch = synthesis_batch(config, raw, None, seeded("calibrate", compute.seed, number))
        both, there = _squared_errors(training, model, batch), batch.truth > 0
        for index, chosen in enumerate((batch.target_mask > 0).unbind(1)):
            pairs[index].append(both[:, chosen, index][:, there[chosen, index]])
            seen = chosen & there[:, index].flatten(1).any(1)
            patients[index].update(usable[number].patient for number in raw.case[seen].tolist())
    if not compute.ranks.first:  # which fits, and keeps
        return {}
    fitted = []
    for index, parts in enumerate(pairs):
        variance, squared = torch.cat(parts, 1)
        unknown = torch.tensor([1.0, 0.0]) if known is None else known[index].cpu()
        fitted.append(_likeliest(variance, squared) if len(variance) else unknown)
    counts = [len(who) or kept for who, kept in zip(patients, inherited, strict=True)]
    return {
        "variance": torch.stack([pair.float() for pair in fitted]),
        "patients": torch.tensor(counts, dtype=torch.int32),
    }


def _squared_errors(training: Training, model: CrossConditionedModel, batch: SynthesisBatch) -> Tensor:
    """Variances and squared errors (2, B, T, *S), float64 on the CPU."""

    def measure(some: slice) -> None:
        part = compute.to_device(cut(batch, some))
        prediction, log_scale = model.predict(model.network_input(part.neighbours, part.available))
        variance = laplace_variance(cast(Tensor, log_scale))
        squared = (prediction - standardise(part.truth)) ** 2
        both[:, some] = torch.stack([variance, squared]).cpu().double()  # Apple's GPUs have no float64

    compute, both = training.compute, torch.zeros(2, *batch.truth.shape, dtype=torch.float64)
    with autocast(compute.device, compute.dtype):
        size = training.inference_batch_size(training.config.synthesis.channels, batch.truth.shape[2:])
        in_chunks(measure, len(batch.truth), size, compute.ranks)
    compute.ranks.all_reduce(both)
    return both


def _likeliest(variance: Tensor, squared: Tensor) -> Tensor:
    """(a, c) under which errors (N,), squared, are likeliest, if Gaussian of variance a·variance + c (N,)."""

    def cost(logs: Any) -> float:
        a, c = torch.from_numpy(logs).exp()
        fitted = a * variance + c
        return float((fitted.log() + squared / fitted).mean())

    floor = max(float(squared.mean()), 1e-12)
    first = [float((squared.mean() / variance.mean()).clamp(1e-6, 1e6).log()), math.log(floor * 1e-3)]
    return torch.from_numpy(minimize(cost, first, method="Nelder-Mead", options={"xatol": 1e-3}).x).exp()
