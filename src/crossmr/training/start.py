"""What a training is: by its settings, the set and the initial model, or why it makes no sense; and in which folder.

A folder is a run's own by its run.json, which says what is trained on what: the same command goes on, another one is
refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from crossmr.config import to_dict
from crossmr.data.dataset import PreparedDataset
from crossmr.data.naming import display_name, in_usual_order
from crossmr.device import choose_device, choose_precision
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, ModelError, SetError
from crossmr.files import digest, is_record, read_json, refuse_foreign, write_json
from crossmr.networks.model import FORMAT, CrossConditionedModel, ModelConfig
from crossmr.networks.trained_on import FILE as PATIENTS
from crossmr.networks.trained_on import FORMAT as PATIENTS_FORMAT
from crossmr.ranks import ALONE, Ranks
from crossmr.registry import load_model
from crossmr.training.choices import choose
from crossmr.training.plan import Budget
from crossmr.training.recipes import STANDARD, Recipe, recipe_of
from crossmr.training.record import knows_its_patients, learnt_from
from crossmr.training.settings import TrainingSettings
from crossmr.training.shared import Compute, Training

PUBLISHED_SOURCES, PUBLISHED_TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
WRITTEN: dict[str, Callable[[Path], bool]] = {
    **dict.fromkeys(("plan.json", "metrics.jsonl"), Path.is_file),
    **dict.fromkeys(("stages", "pictures", "model"), Path.is_dir),
}
"""What a run writes beside run.json, and whether that is a file or a folder."""
LISTED = 8
"""Cases that a warning names."""
NAMES_OF_PARTS = {"train": "training", "val": "validation", "test": "test"}


class Start(NamedTuple):
    """A training that makes sense, in a folder that is its own."""

    training: Training
    initial: CrossConditionedModel | None
    chosen: Sequence[str]
    """The stages that are trained now."""
    lines: Sequence[str]
    """What is to be said of it."""
    learnt: Sequence[str]
    """Cases whose patient the initial model learnt from: none of them validates."""
    identity: dict[str, Any]
    """What makes a run this one."""
    steps: int | None = None
    """Of each stage, where the run was planned so."""


def agreed_start(
    folder: Path,
    prepared: Path,
    settings: TrainingSettings,
    initial_model: CrossConditionedModel | Path | str | None,
    display: Display,
    budget: Budget,
    ranks: Ranks,
) -> Start:
    """What is trained: rank 0 finds out, and makes the folder this run's; the others find the same.

    Raises:
        SetError, ConfigError, ModelError, OutputError: it makes no sense, or the folder holds something else.
    """

    def begin(minutes: float | None, learnt: Sequence[str] | None) -> Start:
        dataset = PreparedDataset(prepared)
        initial = None if initial_model is None else load_model(initial_model, "cpu")
        recipe, reasons = _recipe(dataset, settings, initial, minutes)
        training = _training(folder, dataset, replace(settings, recipe=recipe), initial, display, budget, ranks)
        chosen = _chosen_stages(training.config, settings)
        lines = [f"chosen by the set: {reason}" for reason in reasons]
        if learnt is None:
            learnt = [] if initial is None else learnt_from(initial, dataset.cases)
        if initial is not None:
            lines += [*_left_out(dataset, training), *_learnt_before(dataset, initial, learnt)]
        training = replace(training, val=tuple(case for case in training.val if case.name not in {*learnt}))
        return Start(training, initial, chosen, lines, learnt, _identity(training, dataset, initial))

    begun, steps, budget.minutes = _agree(begin, folder, settings, ranks)
    return begun._replace(steps=steps)


def _agree(
    begin: Callable[[float | None, Sequence[str] | None], Start], folder: Path, settings: TrainingSettings, ranks: Ranks
) -> tuple[Start, int | None, float | None]:
    """What is trained, its steps and minutes: rank 0 begins, and keeps the run; the others begin the same."""
    begun, agreed = None, dict[str, Any]()
    if ranks.first:
        _refuse_foreign(folder)
        minutes = _minutes(folder, settings)
        begun = begin(minutes, None)
        kept = _check_identity(folder, begun.identity, settings)  # last: a run keeps it
        agreed = {"minutes": minutes, "kept": kept, "identity": begun.identity, "learnt": begun.learnt}
    agreed = ranks.broadcast_json(lambda: agreed)
    if begun is None:
        begun = begin(agreed["minutes"], agreed["learnt"])
        _check_same(begun.identity, agreed["identity"])
    steps, minutes = agreed["kept"]
    return begun, steps, minutes


def _check_same(own: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Refuse to train another model than rank 0 does."""
    for key, value in own.items():
        if value != first.get(key):
            raise ConfigError(
                f"{key} is {value} here, {first.get(key)} for rank 0; give all processes the same "
                "command, set and kind of machine, or say --precision float32."
            )


def _left_out(dataset: PreparedDataset, training: Training) -> list[str]:
    """The contrasts of training patients that a model of any subset does not learn, as the initial model lacks them."""
    known = training.config.modalities
    others = in_usual_order({m for case in training.train for m in case.modalities} - {*known})
    if not others or not training.config.any_subset:
        return []
    return [
        f"Warning: {', '.join(map(display_name, others))}, of {dataset.folder}, cannot be learnt: the initial model "
        f"knows {', '.join(map(display_name, known))} alone. A training without --start learns all contrasts"
    ]


def _learnt_before(dataset: PreparedDataset, initial: CrossConditionedModel, learnt: Sequence[str]) -> list[str]:
    """Whom of the set the initial model learnt from, and what follows from that."""

    def found(part: str) -> tuple[str, int]:
        cases = dataset.split(part)
        those = [case for case in cases if case.name in learnt]
        who, whole = ({case.patient for case in some} for some in (those, cases))
        named = ", ".join(case.name for case in those[:LISTED]) + ", …" * (len(those) > LISTED)
        return f"{len(who)} of {len(whole)} {NAMES_OF_PARTS[part]} patients ({named})" if who else "", len(whole - who)

    lines = []
    if of := found("train")[0]:
        lines.append(f"initial model: it learnt from {of} before")
    of, left = found("val")
    if of:
        rest = f"{left} validate{'s' * (left == 1)}" if left else "none validates"
        lines.append(f"Warning: the initial model learnt from {of}: they are left out, and {rest} this training")
    if of := found("test")[0]:
        lines.append(
            f"Warning: the initial model learnt from {of}: for them an evaluation says nothing about new patients"
        )
    if not knows_its_patients(initial):
        lines.append(
            "Warning: the initial model does not say whom it learnt from: patients of validation and test may be among "
            "them"
        )
    return lines


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder where anything but a run has the name of what a run writes.

    A run.json of ours makes the rest ours: it is written first, into a folder that has none of it.

    Raises:
        OutputError: the file or folder, by name.
    """
    refuse_foreign(folder / "run.json", _is_run)
    begun = (folder / "run.json").exists()
    for name in WRITTEN:
        refuse_foreign(folder / name, lambda path: begun and WRITTEN[path.name](path))
    refuse_foreign(folder / "model" / "config.json", partial(is_record, kind=FORMAT))
    refuse_foreign(folder / "model" / PATIENTS, partial(is_record, kind=PATIENTS_FORMAT))


def _is_run(path: Path) -> bool:
    return path.is_file() and {"recipe", "set", "budget", "versions"} <= read_json(path).keys()


def _recipe(
    dataset: PreparedDataset, settings: TrainingSettings, initial: CrossConditionedModel | None, minutes: float | None
) -> tuple[Recipe, Sequence[str]]:
    """The recipe, and a line for each setting that the set decides.

    Raises:
        SetError: no training patient. ModelError: nothing tells how the initial model was trained.
    """
    if not (cases := dataset.split("train")):
        raise SetError(
            f"No patient of {dataset.folder} is for training. Run prepare with another --split or --patients."
        )
    if initial is not None and not initial.record:
        raise ModelError(
            "The initial model has no record of its training. Name the folder of a trained model, or a registered one."
        )
    recipe = settings.chosen_recipe or (STANDARD if initial is None else recipe_of(initial))
    if not recipe.by_set:
        return recipe, ()
    return choose(recipe, cases, choose_device(settings.device).type, minutes)


def _training(
    folder: Path,
    dataset: PreparedDataset,
    settings: TrainingSettings,
    initial: CrossConditionedModel | None,
    display: Display,
    budget: Budget,
    ranks: Ranks = ALONE,
) -> Training:
    """What is trained on what, and where; refuses what makes no sense."""
    recipe = settings.chosen_recipe or STANDARD
    device = ranks.device(settings.device)
    config = recipe.model_config(*_modalities(dataset, recipe, settings, initial))
    if initial is not None:
        _check_initial(initial, config)
    dtype = choose_precision(settings.precision, device)
    for stage in config.stages:
        if (size := recipe.train_config(stage).batch_size) < ranks.size:
            raise ConfigError(
                f"{ranks.size} processes cannot share the {size} samples of a batch of {stage}. Start fewer, or give "
                f"--set {stage}_train.batch_size={ranks.size} or more."
            )
    compute = Compute(device, dtype, settings.seed, display if ranks.first else SILENT, ranks)
    training = Training(folder, recipe, config, dataset.split("train"), dataset.split("val"), compute, budget)
    if initial is None:
        _refuse_unseen(training, dataset)
    return training


def _refuse_unseen(training: Training, dataset: PreparedDataset) -> None:
    """Refuse a target that no training study shows together with the sources."""
    config, usable = training.config, training.usable(training.train)
    for target in config.targets:
        if not any(target in case.modalities for case in usable):
            beside = "another contrast" if config.any_subset else " + ".join(config.sources)
            raise SetError(
                f"No training study of {dataset.folder} has {target} and {beside}. Prepare more patients, or with "
                "another --split; or name other --sources and --targets."
            )


def _minutes(folder: Path, settings: TrainingSettings) -> float | None:
    """The minutes that the run has: those that are given, or, where it goes on, those it was given first."""
    path = folder / "run.json"
    if settings.minutes is not None or settings.steps is not None or not path.exists():
        return settings.minutes
    minutes: float | None = read_json(path).get("budget", {}).get("minutes")
    return minutes


def _modalities(
    dataset: PreparedDataset, recipe: Recipe, settings: TrainingSettings, initial: CrossConditionedModel | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources and targets: those asked for, else the initial model's, else as published, or all for any subset."""
    known = list(dataset.manifest["fingerprint"]["modalities"])
    sources, targets = settings.sources, settings.targets
    if initial is not None and not (recipe.any_subset and (sources or targets)):
        sources, targets = sources or initial.config.sources, targets or initial.config.targets
    if recipe.any_subset:
        cases = dataset.split("train")
        several = [case for case in cases if len(case.modalities) > 1] or cases
        present = {m for case in several for m in case.modalities}
        named = {*(sources or ()), *(targets or ())}
        sources = targets = tuple(in_usual_order(named or present))
        if len(sources) == 1:
            given = " and ".join(f"--{name}" for name in ("sources", "targets") if getattr(settings, name))
            raise ConfigError(
                f"A model of any subset learns each of its contrasts from the others, but there is {sources[0]} alone"
                + (f" in {given}. Name others, too, or leave it away." if given else f" in {dataset.folder}.")
            )
    else:
        sources = tuple(sources or [m for m in PUBLISHED_SOURCES if m in known and m not in (targets or ())])
        targets = tuple(targets or [m for m in PUBLISHED_TARGETS if m in known and m not in sources])
        if (both := set(sources) & set(targets)) and initial is not None and initial.config.any_subset:
            raise ConfigError("The initial model is of any subset. Leave --recipe, --sources and --targets away.")
        if both:
            raise ConfigError(f"{min(both)} is both source and target; for any subset of modalities use recipe 'any'.")
    for modality in () if initial is not None and recipe.any_subset else (*sources, *targets):
        if modality not in known:
            raise ConfigError(f"No study of {dataset.folder} has {modality}; it has {', '.join(known)}.")
    return sources, targets


def _check_initial(initial: CrossConditionedModel, config: ModelConfig) -> None:
    """Refuse to start a network from another's weights; by which error it learns, and which planes, may change."""
    form, wanted = initial.config.synthesis, config.synthesis
    form = replace(form, loss=wanted.loss, lesion_weight=wanted.lesion_weight)
    own, other = to_dict(replace(initial.config, synthesis=form, planes=config.planes)), to_dict(config)
    for key in own:
        if own[key] != other[key]:
            raise ConfigError(
                f"The initial model has another {key} ({_short(own[key])}; expected {_short(other[key])}). "
                "Leave --recipe, --sources and --targets away, and --set to how it is trained."
            )


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _chosen_stages(config: ModelConfig, settings: TrainingSettings) -> tuple[str, ...]:
    """The stages that this call trains, in their order."""
    asked = settings.stages or config.stages
    if unknown := set(asked) - set(config.stages):
        raise ConfigError(f"'{min(unknown)}' is not a stage of this training; it has {', '.join(config.stages)}.")
    return tuple(stage for stage in config.stages if stage in asked)


def _identity(training: Training, dataset: PreparedDataset, initial: CrossConditionedModel | None) -> dict[str, Any]:
    """What makes a run this one."""
    compute = training.compute
    validation = sorted(case.name for case in training.val)
    identity = {
        "set": dataset.fingerprint,
        "validation": digest({"set": dataset.fingerprint, "cases": validation}),
        "recipe": to_dict(training.recipe),
        "sources": list(training.config.sources),
        "targets": list(training.config.targets),
        "seed": compute.seed,
        "precision": str(compute.dtype).removeprefix("torch."),
        "device": compute.device.type,
    }
    return identity if initial is None else {**identity, "initial_model": initial.record["sha256"]}


def _check_identity(
    folder: Path, identity: Mapping[str, Any], settings: TrainingSettings
) -> tuple[int | None, float | None]:
    """Make the folder this run's, or see that it already is; returns its steps and minutes."""
    path, budget = folder / "run.json", {"steps": settings.steps, "minutes": settings.minutes}
    if not path.exists():
        versions = {name: version(name) for name in ("crossmr", "torch", "monai")}
        write_json(path, {**identity, "budget": budget, "versions": versions})
        return settings.steps, settings.minutes
    earlier = read_json(path)
    planned: dict[str, Any] = earlier["budget"]
    if any(budget.values()) and budget != planned:  # before the recipe, which may follow from it
        raise ConfigError(
            f"{folder} is planned for {_words(planned)}, not {_words(budget)}. Give neither --steps nor --minutes to "
            "go on with its own plan, or name another folder."
        )
    for key in ("device", "precision"):  # first: the recipe may follow from the device
        if key in earlier and earlier[key] != identity[key]:
            raise ConfigError(
                f"{folder} holds a run by --{key} {earlier[key]}, and this one would be by --{key} {identity[key]}. "
                f"Go on with --{key} {earlier[key]}, on a machine that has it, or name another folder."
            )
    for key, value in {"initial_model": None, **identity}.items():
        if earlier.get(key) == value or (key == "validation" and key not in earlier):  # as of earlier versions
            continue
        if key == "validation":
            raise ConfigError(
                f"{folder} holds a run that other patients validate: the initial model said then whom it learnt from. "
                "Go on with that one, whose patients.json is beside it, or name another folder."
            )
        if key == "set":
            raise ConfigError(
                f"{folder} holds a run on another set, or on this one before it changed. Prepare it as it was to go "
                "on, or name another folder; patients who were added are learnt from with --start OLD_RUN/model."
            )
        raise ConfigError(f"{folder} holds a run with another {key}; name another folder, or repeat its settings.")
    return planned["steps"], planned["minutes"]


def _words(budget: Mapping[str, Any]) -> str:
    """A budget as it is given on the command line."""
    return next((f"--{name} {value:g}" for name, value in budget.items() if value), "its recipe's epochs")
