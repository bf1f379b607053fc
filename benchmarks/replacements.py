"""What a missing contrast is replaced by: a model's image, a trivial predictor's, or one that an experiment kept.

Kept images lie in OUT/images/PREDICTOR/CASE-TARGET.npy. Their sources are what kept rows of that predictor, case and
target name. Where there are none, a folder that has T1ce and FLAIR of a case, and nothing else, is of the published
task, T1 + T2 → both; an image of any other folder was made from the three other contrasts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from grid import PUBLISHED, images_folder, synthesised
from tumours import CONTRASTS, Array

from crossmr.baselines import predict_baselines
from crossmr.errors import StudyError
from crossmr.evaluation.subjects import Subject
from crossmr.networks.model import CrossConditionedModel

Maker = Callable[[Subject, Sequence[str], Sequence[str]], Mapping[str, Array] | None]
"""Study, sources, targets → images of the targets; none of them where they are dropped; None where it has none."""


def by_model(model: CrossConditionedModel) -> Maker:
    """What a model makes."""

    def make(subject: Subject, sources: Sequence[str], targets: Sequence[str]) -> Mapping[str, Array]:
        return synthesised(model, subject, sources, targets)

    return make


def by_baseline(model: CrossConditionedModel, name: str) -> Maker:
    """What a trivial predictor makes, fitted on the model's training patients."""

    def make(subject: Subject, sources: Sequence[str], targets: Sequence[str]) -> Mapping[str, Array]:
        given = {m: subject.volumes[m] for m in sources}
        made = predict_baselines(model.baselines, model.config.modalities, given, targets)[name]
        return dict(zip(targets, made, strict=True))

    return make


def sources_known(out: Path) -> dict[tuple[str, str, str], set[str]]:
    """(Folder in OUT/images, case, target) → the sources that the kept rows of other experiments name."""
    known: dict[tuple[str, str, str], set[str]] = {}
    for path in sorted(out.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if {"predictor", "case", "target", "sources"} <= row.keys():
                folder = images_folder(out, row["predictor"]).name
                known.setdefault((folder, row["case"], row["target"]), set()).add(row["sources"])
    return known


def by_images(folder: Path, known: Mapping[tuple[str, str, str], set[str]]) -> Maker:
    """What another experiment kept, where it was made without the missing contrasts."""

    def make(subject: Subject, sources: Sequence[str], targets: Sequence[str]) -> Mapping[str, Array] | None:
        there = {m for m in CONTRASTS if (folder / f"{subject.name}-{m}.npy").exists()}
        published = there == set(PUBLISHED[1])
        for target in targets:
            guess = PUBLISHED[0] if published else [m for m in CONTRASTS if m != target]
            from_ = known.get((folder.name, subject.name, target), {"+".join(guess)})
            if target not in there or any(set(targets) & set(one.split("+")) for one in from_):
                return None
        images = {t: np.load(folder / f"{subject.name}-{t}.npy").astype(np.float32) for t in targets}
        for target, image in images.items():
            if image.shape != subject.head.shape:
                raise StudyError(
                    f"{folder / subject.name}-{target}.npy is {image.shape}; expected {subject.head.shape}."
                )
        return images

    return make
