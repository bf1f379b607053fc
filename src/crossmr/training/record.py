"""What a model keeps of its training beside its weights: baselines, what is typical, the record, the patients."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from crossmr.baselines import fit_baselines, with_earlier
from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.data.dataset import Case
from crossmr.data.head import bounding_box
from crossmr.files import read_json, read_lines, write_json
from crossmr.networks.model import CrossConditionedModel
from crossmr.networks.trained_on import PHANTOM, PatientList, add_seen, count_seen, find, names_of, remember
from crossmr.training.shared import Training
from crossmr.typical import describe, summarise

DESCRIBED = 100
"""Studies of a training that are looked at for what is typical, at most."""


def baselines_of(training: Training, initial: CrossConditionedModel | None) -> dict[str, Tensor]:
    """The baselines, fitted once per run.

    What is typical of too few studies to tell is as the initial model has it; so is all of modalities that none has.
    """
    place = training.folder / "stages" / "baselines"

    def first() -> tuple[dict[str, Tensor], None]:
        if not (place / "baselines.json").exists():
            training.compute.display.say(f"baselines: reading {len(training.train)} training studies")
            fitted = fit_baselines([_reader(case) for case in training.train], training.config.modalities)
            if initial is not None and initial.baselines and training.config.any_subset:
                fitted = with_earlier(fitted, initial.baselines)
            known = {} if initial is None else initial.record.get("training", {}).get("typical", {})
            found = _typical(training, fitted)
            write_json(place / "typical.json", {g: {**known.get(g, {}), **found.get(g, {})} for g in {*known, *found}})
            save_bundle(place, {"baselines": fitted}, {}, "baselines")
        return load_bundle(place, "baselines")[0]["baselines"], None

    return training.compute.ranks.broadcast(first)[0]


def _typical(training: Training, baselines: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the training's patients look like, of some of them; phantoms count only where there is nothing else."""
    usable = training.usable(training.train)
    cases = [case for case in usable if not case.name.startswith(PHANTOM)] or usable
    some = cases[:: max(1, math.ceil(len(cases) / DESCRIBED))]
    return summarise((case.masked_background, _described(case, training, baselines)) for case in some)


def _described(case: Case, training: Training, baselines: Mapping[str, Tensor]) -> dict[str, float]:
    head = case.masks()[:, 0] > 0
    box = bounding_box(head, 0)
    volumes = {m: case.volume(m)[box] for m in case.modalities}
    return describe(volumes, head[box], case.spacing_mm, baselines, training.config.modalities)


def _reader(case: Case) -> Callable[[], dict[str, Any]]:
    return lambda: {modality: case.volume(modality) for modality in case.modalities}


def record_of(training: Training, initial: CrossConditionedModel | None) -> dict[str, Any]:
    """What a model keeps of its training."""
    folder = training.folder
    learnt = training.usable(training.train)
    seen = count_seen((case.name, case.modalities, case.masked_background) for case in learnt)
    if initial is not None:
        seen = add_seen(seen, initial.record["training"].get("seen", {}))
    run = {key: value for key, value in read_json(folder / "run.json").items() if key != "patients"}  # of old runs
    own = {"plan": read_json(folder / "plan.json"), "seen": seen, "validation": _validated(training)}
    return {**run, **own, **_described_in(folder)}


def _validated(training: Training) -> dict[str, dict[str, float]]:
    """Target → correlation on validation patients, of the last C-UNet and of the linear regression; where both are."""
    last: dict[str, Any] = {}
    for line in read_lines(training.folder / "metrics.jsonl"):
        last |= line if line["stage"] == "synthesis" else {}
    pairs = {
        t: [last.get(f"{who}_correlation_{t}", math.nan) for who in ("val", "regression")]
        for t in training.config.targets
    }
    return {
        target: {"correlation": own, "linear_regression": linear}
        for target, (own, linear) in pairs.items()
        if math.isfinite(own + linear)
    }


def _described_in(folder: Path) -> dict[str, Any]:
    """What is typical of the training; nothing of runs that began before this was looked at."""
    path = folder / "stages" / "baselines" / "typical.json"
    return {"typical": read_json(path)} if path.exists() else {}


def patients_of(training: Training, initial: CrossConditionedModel | None) -> list[PatientList]:
    """On whom the model was trained, those of the initial model included, or that nobody knows who these were."""

    def names(cases: Sequence[Case]) -> list[str]:
        return [name for case in cases for name in _names_of(case)]

    earlier = () if initial is None else (initial.patients or (PatientList(),))
    return [remember(names(training.train), names(training.val)), *earlier]


def learnt_from(initial: CrossConditionedModel, cases: Sequence[Case]) -> list[str]:
    """The cases whose patient the initial model, or one that it started from, learnt from: all of the patient's."""
    found = find(initial.patients, {case.name: _names_of(case) for case in cases})
    learnt = {case.patient for case in cases if found.get(case.name) == "train"}
    return [case.name for case in cases if case.patient in learnt]


def knows_its_patients(initial: CrossConditionedModel) -> bool:
    """Whether the initial model says of every training whom it learnt from."""
    return bool(initial.patients) and all(one.salt for one in initial.patients)


def _names_of(case: Case) -> list[str]:
    """All that a case's patient can be recognised by."""
    return [*(names_of(case.named, ()) if case.named else ()), *names_of(case.patient, case.scans)]
