"""The stages of the Cross-conditioned Diffusion Model, trained one after the other.

RUN/
├── run.json       what is trained on what, and the budget; the same command continues it, another is refused
├── plan.json      steps of each stage, as they were planned and corrected
├── stages/STAGE/  the two newest checkpoints
├── metrics.jsonl  losses and validation
├── pictures/      source, prediction, truth and error on validation patients
├── crossmr.log    what was said; it names paths, and is not for sharing
└── model/         the result; see networks/model.py
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossmr.checkpoint import load_checkpoint
from crossmr.config import check_kind, from_dict, to_dict
from crossmr.data.naming import display_name
from crossmr.device import numerics
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, Interrupted, RankLost
from crossmr.files import locked
from crossmr.networks.model import INHERITED, CrossConditionedModel, calibrated_on, read_model, save_model
from crossmr.ranks import Ranks, joined
from crossmr.training.calibration import calibration
from crossmr.training.loop import Trainer, without_prefix
from crossmr.training.plan import Budget, Plan, read_plan, write_plan
from crossmr.training.record import baselines_of, patients_of, record_of
from crossmr.training.settings import TrainingSettings
from crossmr.training.shared import Training
from crossmr.training.stages import STAGES
from crossmr.training.start import agreed_start


def train(
    prepared: Path | str,
    run: Path | str,
    settings: TrainingSettings | None = None,
    *,
    initial_model: CrossConditionedModel | Path | str | None = None,
    display: Display = SILENT,
) -> Path:
    """Train the stages one after another on a prepared set, or go on where an earlier call stopped.

    Args:
        prepared: the set's folder, as `prepare` wrote it.
        run: where the run lives; its 'model' folder is the result.
        settings: what is trained, for how long, and where.
        initial_model: a trained model, loaded, as folder or by name, from whose weights every network starts.
            Modalities and networks are then its own; a model of any subset goes on with those of its modalities that
            the set has, and keeps what it knew of the others, which nothing trains. Validation patients whom it learnt
            from are left out.
        display: where progress goes.

    Returns:
        The model's folder; it holds a model once every stage is finished.

    Several processes that torchrun or srun started train together: each calls this, with the same arguments, and has a
    part of every batch. Rank 0 alone speaks, and alone reads and writes `run`.

    Raises:
        SetError, ConfigError, ModelError, OutputError: with one line that says what to do; RUN may hold other files,
            but none that has the name of one of a run's.
        Interrupted: on Ctrl-C, after a checkpoint.
        RankLost: another process of the training ended.
    """
    budget, settings, folder = Budget(), TrainingSettings() if settings is None else settings, Path(run)
    check_kind(settings, TrainingSettings)

    with joined(settings.device) as ranks, _only_own_failures(ranks, display), _locked_by_first(folder, ranks):
        begun = agreed_start(folder, Path(prepared), settings, initial_model, display, budget, ranks)
        with display.logged(folder / LOG) if ranks.first else nullcontext(SILENT) as logging:
            for line in begun.lines:
                logging.say(line)
            if ranks.size > 1:
                logging.say(f"{ranks.size} processes train together, {ranks.local_size} of them on this machine")
            training = replace(begun.training, compute=replace(begun.training.compute, display=logging))
            with numerics(training.compute.device, training.compute.dtype):  # of the gradients, too
                _train_model(training, begun.initial, begun.chosen, begun.steps)
            ranks.barrier()  # where one process ends, torchrun ends the others
    return folder / "model"


def _locked_by_first(folder: Path, ranks: Ranks) -> AbstractContextManager[None]:
    return locked(folder) if ranks.first else nullcontext()


@contextmanager
def _only_own_failures(ranks: Ranks, display: Display) -> Iterator[None]:
    """Let a process above rank 0 say errors of its own alone: rank 0 says what all share, as a stop."""
    try:
        yield
    except KeyboardInterrupt as error:
        if ranks.first:
            raise
        raise Interrupted("Stopped.") from error
    except CrossmrError as error:
        if not ranks.first and not isinstance(error, (RankLost, Interrupted)):
            display.say_failure(f"crossmr: process {ranks.rank + 1} of {ranks.size}: {error}")
        raise


def _train_model(
    training: Training, initial: CrossConditionedModel | None, chosen: Sequence[str], steps: int | None
) -> None:
    """Train the chosen stages, and write the model if all stages are finished."""
    for line in _learnt_from(training):
        training.compute.display.say(line)
    model = _first_model(training, initial)
    finished, trained = _train_stages(training, model, chosen, steps)
    if finished and not trained and training.compute.ranks.broadcast_json(lambda: _is_whole(training.folder / "model")):
        training.compute.display.say("model: finished before")
        return
    if finished:
        if model.config.uncertainty:
            validated, say = training.usable(training.val), training.compute.display.say
            how = "calibrated on validation patients" if validated else "as they are, without validation patients"
            if not validated and initial is not None and initial.calibration:
                how = "as the initial model's, without validation patients"
            say(f"standard deviations: {how}")
            model.calibration = calibration(training, model, None if initial is None else initial.calibration)
            for line in _not_calibrated(model):
                say(line)
        if not training.compute.ranks.first:
            return
        save_model(training.folder / "model", model, record_of(training, initial), patients_of(training, initial))


def _is_whole(model: Path) -> bool:
    """Whether a model was saved and is as it was; then it stays, as other runs may have started from it."""
    with suppress(CrossmrError):
        read_model(model)
        return True
    return False


def _not_calibrated(model: CrossConditionedModel) -> list[str]:
    """The targets whose standard deviations were not fitted to errors of this training, where others were."""
    ways = {0: "not calibrated", INHERITED: "as the initial model's"}
    counts = calibrated_on(model.calibration, model.config.targets)
    by_way = {how: [display_name(t) for t, count in counts.items() if count == n] for n, how in ways.items()}
    return [
        f"standard deviations of {', '.join(targets)}: {how}, since no validation patient has "
        + ("them" if len(targets) > 1 else "it")
        for how, targets in by_way.items()
        if 0 < len(targets) < len(counts)
    ]


def _learnt_from(training: Training) -> list[str]:
    """Of how many studies the synthesis learns, and is validated by, where others cannot serve; and what few have."""
    config, lines = training.config, list[str]()
    for cases, what in ((training.train, "training"), (training.val, "validation")):
        usable = training.usable(cases)
        if len(usable) < len(cases):
            needed = "two contrasts" if config.any_subset else f"{' + '.join(config.sources)} and a target"
            advice = "" if config.any_subset else "; a model of --recipe any needs none of them"
            lines.append(
                f"synthesis: {len(usable)} of {len(cases)} {what} studies can serve, since it needs {needed}"
                + (advice if what == "training" else "")
            )
        counts = {target: sum(target in case.modalities for case in usable) for target in config.targets}
        if lacking := [f"{count} have {target}" for target, count in counts.items() if count < len(usable)]:
            lines.append(f"synthesis: of {len(usable)} {what} studies {', '.join(lacking)}")
    return lines


def _first_model(training: Training, initial: CrossConditionedModel | None) -> CrossConditionedModel:
    """The networks before their training: with first weights of their own, or the initial model's."""
    model = CrossConditionedModel(training.config, seed=training.compute.seed)
    model.baselines = baselines_of(training, initial)
    if initial is not None:
        for name, network in model.networks().items():
            network.load_state_dict(initial.networks()[name].state_dict())
    if training.config.spatial_dims == 2:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(training.compute.device)


def _load_finished(training: Training, model: CrossConditionedModel, stage: str) -> bool:
    """Load a stage's averaged weights if it was trained to its end."""

    def averaged() -> tuple[dict[str, Tensor], dict[str, Any]]:
        checkpoint = load_checkpoint(training.folder / "stages" / stage, training.compute.display.say)
        if checkpoint is None or not checkpoint[1]["finished"]:
            return {}, {}
        return without_prefix(checkpoint[0], "ema."), checkpoint[1]

    tensors, data = training.compute.ranks.broadcast(averaged)
    if not data:
        return False
    model.network_of(stage).load_state_dict(tensors)
    training.budget.before = max(training.budget.before, float(data["spent"]))
    return True


def _train_stages(
    training: Training, model: CrossConditionedModel, chosen: Sequence[str], steps: int | None
) -> tuple[bool, bool]:
    """Train the chosen stages that are not finished, in their order: whether all are finished, and one was trained."""
    order, say, trained = training.config.stages, training.compute.display.say, False
    for stage in order:
        if _load_finished(training, model, stage):
            say(f"{stage}: finished before")
        elif stage in chosen:
            _train_stage(training, model, stage, steps)
            trained = True
        elif later := [name for name in chosen if order.index(name) > order.index(stage)]:
            raise ConfigError(f"Stage '{stage}' comes before '{later[0]}' and is not finished; train it first.")
        else:
            say(f"{stage}: not trained yet, so there is no model yet")
            return False, trained
    return True, trained


def _train_stage(training: Training, model: CrossConditionedModel, name: str, steps: int | None) -> None:
    """Train one stage, as its plan says, or a new one."""
    stage, config = STAGES[name](training, model.eval()), training.recipe.train_config(name)
    trainer = Trainer(training.folder, stage, config, training.compute, training.budget)
    steps = steps or max(1, round(config.epochs * stage.data.steps_per_epoch))
    plan = training.compute.ranks.broadcast_json(lambda: to_dict(_plan(training, name, steps)))
    averaged = trainer.train(from_dict(Plan, plan))
    stage.network.load_state_dict(averaged.state_dict())
    stage.network.requires_grad_(False)


def _plan(training: Training, name: str, steps: int) -> Plan:
    """A stage's plan: as it was made before, or of what is left of the budget, or so many steps."""
    folder, budget, recipe = training.folder, training.budget, training.recipe
    if (plan := read_plan(folder, name)) is not None:
        return plan
    if budget.minutes is not None:
        later = training.config.stages[training.config.stages.index(name) :]
        fraction = recipe.train_config(name).fraction / sum(recipe.train_config(stage).fraction for stage in later)
        return Plan(until=budget.until(fraction))
    plan = Plan(segments=((0, steps),))
    write_plan(folder, name, plan)
    return plan
