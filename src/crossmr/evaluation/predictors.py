"""What is measured: a model by its own guidance and by others, a second model, and the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch import Tensor

from crossmr.baselines import BASELINES, predict_baselines
from crossmr.errors import ConfigError
from crossmr.evaluation.subjects import Array, FoundSubject, Subject
from crossmr.networks.inference import (
    HeadVolumes,
    InferenceSettings,
    check_settings,
    chosen_guidance,
    passing_memory,
    samples_drawn,
    synthesise,
)
from crossmr.networks.model import CrossConditionedModel, Guidance, ModelConfig
from crossmr.registry import find_model, load_model, name_of

AGAINST = "against: "
"""What the second model's name begins with in tables and files."""


MASKS, MEASURING = 3, 110
"""Bytes per voxel of the head's box: of a subject's masks, and of what similarity and wavelets take of one image."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model and its settings, under one name in tables and files."""

    name: str
    model: CrossConditionedModel
    settings: InferenceSettings


@dataclass(frozen=True, eq=False)
class Predictions:
    """What was synthesised of one study from one set of sources."""

    images: Mapping[str, Mapping[str, Array]]
    """Predictor → target → volume (Z, Y, X) in [0, 1]; the model's own first. A baseline may lack targets."""
    stds: Mapping[str, Array]
    """Target → standard deviation (Z, Y, X) of the model's own; empty if it gives none."""


def find_predictors(
    model: CrossConditionedModel,
    settings: InferenceSettings,
    guidances: Sequence[Guidance] = (),
    against: Path | str | None = None,
) -> list[Predictor]:
    """The model by its own guidance first, then by other guidance modes; then the second model, `against`.

    Raises:
        ConfigError: a model cannot do what it is asked. ModelError: there is no such model.
    """
    modes = dict.fromkeys((chosen_guidance(model, settings), *guidances))
    predictors = [Predictor(predictor_name(mode), model, _guided(settings, mode)) for mode in modes]
    if against is not None:
        predictors.append(_second_model(model, against, settings))
    for predictor in predictors:
        check_settings(predictor.model, predictor.settings)
    if not any(samples_drawn(predictor.model, predictor.settings) for predictor in predictors):
        check_settings(model, settings)  # which refuses a number of samples, where none are drawn
    return predictors


def predictor_name(guidance: Guidance) -> str:
    """The name of one of the model's guidance modes in tables and files."""
    return "unguided" if guidance == "none" else f"guided: {guidance}"


def _guided(settings: InferenceSettings, guidance: Guidance) -> InferenceSettings:
    """The settings of one guidance mode; without guidance no samples are drawn."""
    return replace(settings, guidance=guidance, samples=None if guidance == "none" else settings.samples)


def _second_model(model: CrossConditionedModel, against: Path | str, settings: InferenceSettings) -> Predictor:
    """The model named `against`, by its own default guidance and the planes that it can, on the first one's device."""
    folder = find_model(against)
    second = load_model(folder, model.device)
    if not _same_task(model.config, second.config):
        raise ConfigError(
            f"--against {against} makes {_task(second.config)}, but the model makes {_task(model.config)}. "
            "Name a model of these sources and targets."
        )
    name = name_of(folder) if folder == Path(against) else str(against)  # that of a registered one
    guidance = chosen_guidance(second, replace(settings, guidance=None))
    if settings.planes != 1:
        settings = replace(settings, planes=None)
    return Predictor(f"{AGAINST}{name}", second, _guided(settings, guidance))


def _same_task(first: ModelConfig, second: ModelConfig) -> bool:
    """Whether the second model can synthesise all that the first is measured on, from the same sources."""
    if second.any_subset:
        return set(first.modalities) <= set(second.modalities)
    return set(first.sources) == set(second.sources) and set(first.targets) <= set(second.targets)


def _task(config: ModelConfig) -> str:
    return f"{', '.join(config.targets)} from {'any of ' * config.any_subset}{', '.join(config.sources)}"


def memory_needed(found: FoundSubject, predictors: Sequence[Predictor], *, every_subset: bool = False) -> int:
    """About how many bytes of main memory it takes to measure a study, by the headers of its files; 0 if unreadable.

    The larger of two moments: it is read, or its largest set of predictions is measured.
    """
    study, own = found.memory(), predictors[0].model
    if not study.shape:
        return 0
    acquired = [m for m in found.modalities() if m in own.config.modalities]
    hidden = len(acquired) - 1 if every_subset else 1
    targets = hidden if own.config.any_subset else len(set(own.config.targets) & set(acquired))
    volumes = len(acquired) + targets * (len(predictors) + len(BASELINES) + 1)  # with the standard deviation
    on_cpu = [predictor.model.config for predictor in predictors if predictor.model.device.type == "cpu"]
    features = max((passing_memory(config, study.shape) for config in on_cpu), default=0)
    return study.bytes(study.head * (4 * volumes + MASKS + MEASURING)) + features


def predict(
    subject: Subject,
    sources: Sequence[str],
    predictors: Sequence[Predictor],
    others: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
) -> Predictions:
    """Synthesise the targets of one study by every predictor, and by the first one's baselines, from `sources` alone.

    Beside them stand `others`, images of other programs (name → target → volume), of which nobody knows from which
    sources they were made.

    The targets are those of the first model that the study has and that are hidden. They are 0 where the true one has
    nothing of the head.
    """
    model = predictors[0].model
    targets = [m for m in model.config.targets if m in subject.volumes and m not in sources]
    head = HeadVolumes.of({m: subject.volumes[m] for m in sources}, subject.head, subject.spacing_mm)

    def by_target(volumes: Sequence[Array] | Tensor) -> dict[str, Array]:
        pairs = zip(targets, map(np.asarray, volumes), strict=True)
        return {t: np.where(subject.head_of(t), volume, np.float32(0)) for t, volume in pairs}

    results = [
        synthesise(each.model, head, subject.name, replace(each.settings, targets=tuple(targets)))
        for each in predictors
    ]
    images = {each.name: by_target(result.images) for each, result in zip(predictors, results, strict=True)}
    for name, made in others.items():
        if hidden := {target: made[target] for target in targets if target in made}:
            images[name] = hidden
    for target in targets if model.baselines else ():
        baselines = predict_baselines(model.baselines, model.config.modalities, head.volumes, [target])
        for name, (volume,) in baselines.items():
            images.setdefault(name, {})[target] = np.where(subject.head_of(target), volume, np.float32(0))
    return Predictions(images, {} if results[0].stds is None else by_target(results[0].stds))
