"""One axial slice in so many of a study: its syntheses and their measures, at that fraction of the cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from grid import Row

from crossmr import metrics
from crossmr.evaluation.measures import above_air, measure_contrasts, regions_of
from crossmr.evaluation.subjects import Array, Subject
from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import CrossConditionedModel

FOUR = ("t1n", "t1c", "t2w", "t2f")


def thinned(subject: Subject, every: int) -> Subject:
    """A study of which one axial slice in so many is left."""
    volumes = {m: np.ascontiguousarray(volume[::every]) for m, volume in subject.volumes.items()}
    z, y, x = subject.spacing_mm
    masks = {name: getattr(subject, name)[::every] for name in ("head", "tumour", "enhancing")}
    return replace(subject, volumes=volumes, spacing_mm=(z * every, y, x), **masks)


def made(
    model: CrossConditionedModel, subject: Subject, sources: Sequence[str], every: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a model makes of one axial slice in `every` of a study: missing contrast → image, and its deviation."""
    targets = tuple(m for m in model.config.targets if m in subject.volumes and m not in sources)
    voxels = [0 if z % every else int(count) for z, count in enumerate(subject.head.sum((1, 2)))]
    head = HeadVolumes({m: subject.volumes[m] for m in sources}, voxels, subject.spacing_mm[0])
    result = synthesise(model, head, subject.name, InferenceSettings(targets=targets))
    inside = subject.head[::every]
    images, stds = (
        {
            t: np.where(inside, volume[::every], np.float32(0))
            for t, volume in zip(targets, volumes.numpy(), strict=True)
        }
        for volumes in (result.images, result.images if result.stds is None else result.stds)
    )
    return images, stds


def rows_of(model: CrossConditionedModel, subject: Subject, every: int, facts: Mapping[str, Any]) -> list[Row]:
    """A row for each contrast, made from the three others."""
    less, rows = thinned(subject, every), []
    for target in FOUR:
        regions = regions_of(less, target)
        sources = [m for m in FOUR if m != target]
        images, _ = made(model, subject, sources, every)
        row = {**facts, "case": subject.name, "patient": subject.patient, "target": target}
        air = less.air[target]
        predicted, truth = (torch.from_numpy(above_air(v, air))[None] for v in (images[target], less.volumes[target]))
        predicted, truth = metrics.scale_by_truth(predicted, truth)
        for name, region in (("correlation", "deep"), ("psnr", "brain")):
            chosen = torch.from_numpy(regions[region])[None]
            x, y = (volume[chosen].reshape(1, 1, -1) for volume in (predicted, truth))
            score = metrics.correlation(x, y) if name == "correlation" else metrics.psnr(x, y, 1.0)
            row[f"{name}_{region}"] = float(score)
        for contrast in measure_contrasts(less, sources, {"": images}):
            row[f"{contrast.structure}_kept"] = contrast.kept
        rows.append(row)
    return rows
