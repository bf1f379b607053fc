"""The stages of the Cross-conditioned Diffusion Model, trained one after the other by the loop of fitting.py.

RUN/
├── run.json       what is trained on what; the same command continues it, another is refused
├── plan.json      steps of each stage, fixed when the stage starts
├── stages/STAGE/  the two newest checkpoints
├── metrics.jsonl  losses and validation
├── pictures/      source, prediction, truth and error on held-out patients
└── model/         the result; see model.py
"""

import logging
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor

from crossmr.checkpoint import load_bundle, load_checkpoint, save_bundle
from crossmr.config import to_dict
from crossmr.data.dataset import Case, PreparedSet
from crossmr.data.naming import in_usual_order
from crossmr.device import choose_device, choose_precision
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError
from crossmr.files import read_json, sole_writer, write_json
from crossmr.fitting import Loop, fit, steps_in
from crossmr.jobs import Run, calibration, job_of
from crossmr.model import CrossConditionedModel, ModelConfig, load_model, pseudonym, save_model
from crossmr.recipes import STANDARD, Recipe, recipe_of
from crossmr.stages.synthesis import LinearMix
from crossmr.store import find_model
from crossmr.trivial import fit_trivial, linear_weights

Made = TypeVar("Made")

PUBLISHED_SOURCES, PUBLISHED_TARGETS = ("t1n", "t2w"), ("t1c", "t2f")


@sole_writer("run")
def train(
    prepared: Path | str,
    run: Path | str,
    *,
    recipe: Recipe | None = None,
    start: CrossConditionedModel | Path | str | None = None,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
    twin: bool = False,
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    display: Display = SILENT,
) -> Path:
    """Train the stages one after another on a prepared set, or go on where an earlier call stopped.

    Args:
        prepared: the set's folder, as `prepare` wrote it.
        run: where the run lives; its 'model' folder is the result.
        recipe: networks and optimisation; by default STANDARD, or that of `start`.
        start: a trained model, loaded, as folder or by name, whose weights every network starts from. Modalities and
            networks are then its own; a model of any subset goes on with those of its modalities that the set has.
        sources: modalities to read; by default the published T1 and T2, as far as the set has them.
        targets: modalities to synthesise; by default the published T1ce and FLAIR. A recipe of any subset reads and
            synthesises all of them, by default all that the set has.
        stages: train these alone; the stages before them must be finished.
        twin: train the C-UNet's unguided twin too, which evaluations print beside it; with cells the unguided
            C-UNet is its own.
        steps: steps of every stage, instead of the recipe's epochs.
        minutes: time for all stages together, instead of the recipe's epochs.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.
        precision: 'auto', 'bfloat16' or 'float32'.
        seed: of weights, batches, masks and noise.
        display: where progress goes.

    Returns:
        The model's folder; it holds a model once every stage is finished.

    Raises:
        SetError, ConfigError, ModelError, OutputError: with one line that says what to do.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    opened, folder = PreparedSet(prepared), Path(run)
    known = list(opened.manifest["fingerprint"]["modalities"])
    begun = load_model(find_model(start)) if isinstance(start, (str, Path)) else start
    if recipe is None:
        recipe = STANDARD if begun is None else recipe_of(begun)
    if begun is not None:
        sources, targets = sources or begun.config.sources, targets or begun.config.targets
    if recipe.any_subset:
        learnt = {m for case in opened.part("train") for m in case.modalities}
        sources = targets = tuple(in_usual_order({*(sources or ()), *(targets or ())} or learnt))
    else:
        sources = tuple(sources or [m for m in PUBLISHED_SOURCES if m in known and m not in (targets or ())])
        targets = tuple(targets or [m for m in PUBLISHED_TARGETS if m in known and m not in sources])
        if both := set(sources) & set(targets):
            raise ConfigError(f"{min(both)} is both source and target; for any subset of modalities use recipe 'any'.")
    if begun is not None:
        _check_start(begun, recipe.model_config(sources, targets))
    needed = [] if begun is not None and recipe.any_subset else [*sources, *targets]
    for modality in needed:
        if modality not in known:
            raise ConfigError(f"No study of {opened.folder} has {modality}; it has {', '.join(known)}.")
    if steps is not None and minutes is not None:
        raise ConfigError("Give --steps or --minutes, not both.")
    if (steps is not None and steps < 1) or (minutes is not None and not 0 < minutes < math.inf):  # NaN fails too
        raise ConfigError("--steps and --minutes are positive.")
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"--seed is {seed}; wanted a whole number of at most 64 bits.")
    fabric, dtype = _fabric(device, precision)
    loop = Loop(folder, fabric, seed, display)
    state = Run(loop, recipe, sources, targets, opened.part("train"), opened.part("val"), begun)
    model = _initial_model(state, twin)
    order = list(model.stages())
    chosen = list(stages or order)
    if unknown := set(chosen) - set(order):
        raise ConfigError(f"'{min(unknown)}' is no stage of this training; it has {', '.join(order)}.")
    _claim(state, opened, dtype)  # once all of the wish makes sense: a run cannot change it
    shares = sum(recipe.fit_config(stage).share for stage in chosen)
    for stage in order:
        if _load_finished(state, model, stage):
            display.say(f"{stage}: finished before")
        elif stage in chosen:
            share = None if minutes is None else minutes * recipe.fit_config(stage).share / shares
            _train_stage(state, model, stage, steps, share)
        elif any(order.index(later) > order.index(stage) for later in chosen):
            raise ConfigError(f"Stage '{stage}' comes before '{chosen[-1]}' and is not finished; train it first.")
        else:
            display.say(f"{stage}: not trained yet, so there is no model yet")
            return folder / "model"
    model.trivial = _trivial(state)
    if model.config.representation.cell:
        display.say("calibration of the deviations on validation patients")
        model.calibration = calibration(state, model)
    seen = {"studies": len(state.train), "without_skull": sum(case.masked_background for case in state.train)}
    if begun is not None:
        seen = {key: count + begun.record["training"].get("seen", {}).get(key, 0) for key, count in seen.items()}
    record = {**read_json(folder / "run.json"), "plan": read_json(folder / "plan.json"), "seen": seen}
    save_model(folder / "model", model, record)
    return folder / "model"


def _trivial(run: Run) -> dict[str, Tensor]:
    """The trivial predictors, fitted once a run."""
    folder = run.loop.folder / "stages" / "trivial"
    if not (folder / "trivial.json").exists():
        run.loop.display.say("trivial predictors")
        fitted = fit_trivial([_reader(case) for case in run.train], run.modalities)
        save_bundle(folder, {"trivial": fitted}, {}, "trivial")
    return load_bundle(folder, "trivial")[0]["trivial"]


def _fit_mix(run: Run, mix: LinearMix) -> None:
    """Let a C-UNet start from the least-squares mix, for each subset of sources that may be shown."""
    fitted, count = _trivial(run), len(run.sources)
    everything = tuple(range(count))
    for pattern in range(len(mix.weights)):
        shown = [s for s in everything if pattern >> s & 1] if mix.any_subset else everything
        for index, target in enumerate(run.targets):
            number = run.modalities.index(target)
            if shown and number not in shown:
                weights = torch.from_numpy(linear_weights(fitted, shown, number))
                mix.weights[pattern, [*shown, count], index] = weights.to(mix.weights)


def _fabric(device: str, precision: str) -> tuple[Fabric, str]:
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=chosen.type,
        devices=1 if chosen.index is None else [chosen.index],
        precision="bf16-mixed" if dtype is torch.bfloat16 else "32-true",
    )
    fabric.launch()
    return fabric, str(dtype).removeprefix("torch.")


def _reader(case: Case) -> Callable[[], dict[str, Any]]:
    return lambda: {modality: case.volume(modality) for modality in case.modalities}


def _claim(run: Run, prepared: PreparedSet, dtype: str) -> None:
    """Make the folder this run's, or see that it already is."""
    identity = {
        "recipe": to_dict(run.recipe),
        "sources": list(run.sources),
        "targets": list(run.targets),
        "seed": run.loop.seed,
        "set": prepared.fingerprint,
        "precision": dtype,
        "device": run.loop.fabric.device.type,
        "patients": {"train": _pseudonyms(run, "train"), "val": _pseudonyms(run, "val")},
    }
    if run.start is not None:
        identity["start"] = run.start.record["sha256"]
    path = run.loop.folder / "run.json"
    if not path.exists():
        write_json(path, {**identity, "versions": {name: version(name) for name in ("crossmr", "torch", "monai")}})
        return
    earlier = read_json(path)
    for key, value in {"start": None, **identity}.items():
        if earlier.get(key) != value:
            raise ConfigError(
                f"{run.loop.folder} holds a run with another {key}; name another folder, or repeat its settings."
            )


def _check_start(start: CrossConditionedModel, wanted: ModelConfig) -> None:
    """Refuse to start a network from another's weights."""
    own, other = to_dict(start.config), to_dict(wanted)
    for key in own:
        if own[key] != other[key]:
            raise ConfigError(
                f"The model to start from has another {key} ({_short(own[key])}; wanted {_short(other[key])}). "
                "Leave --recipe, --sources and --targets away, and --set to how it is trained."
            )


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pseudonyms(run: Run, part: str) -> list[str]:
    """Of the patients whom the model will have seen, those of the model it starts from included."""
    earlier = [] if run.start is None else run.start.record["training"].get("patients", {}).get(part, [])
    cases = run.train if part == "train" else run.val
    return sorted({*earlier, *(pseudonym(case.patient) for case in cases)})


def _initial_model(run: Run, twin: bool) -> CrossConditionedModel:
    """The untrained networks; each one's first weights depend on the seed and its own name alone."""
    config = run.recipe.model_config(run.sources, run.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.loop.seed)
        began = (run.loop.folder / "stages" / "twin").exists()
        model = CrossConditionedModel(config, twin=(twin or began) and not config.representation.cell)
    for name, network in model.networks().items():
        if run.start is not None and name in run.start.networks():
            network.load_state_dict(run.start.networks()[name].state_dict())
    if config.spatial_dims == 2:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(run.loop.fabric.device)


def _load_finished(run: Run, model: CrossConditionedModel, stage: str) -> bool:
    """Load a stage's averaged weights if it was trained to its end."""
    found = load_checkpoint(run.loop.folder / "stages" / stage, run.loop.display.say)
    if found is None or found[1]["step"] < found[1]["steps"]:
        return False
    weights = {key.removeprefix("ema."): value for key, value in found[0].items() if key.startswith("ema.")}
    model.stages()[stage].load_state_dict(weights)
    return True


def _train_stage(run: Run, model: CrossConditionedModel, stage: str, steps: int | None, minutes: float | None) -> None:
    job, network = job_of(run, model, stage), model.stages()[stage].requires_grad_(True)
    if stage == "guidance":
        model.synthesis.condition_layers_only()
    mix = getattr(network, "mix", None)
    if run.start is None and stage in ("synthesis", "twin") and isinstance(mix, LinearMix):
        _fit_mix(run, mix)
    config = run.recipe.fit_config(stage)
    plan_path = run.loop.folder / "plan.json"
    plan = read_json(plan_path) if plan_path.exists() else {}
    if stage not in plan:
        if minutes is not None and stage == "twin" and "synthesis" in plan:
            plan[stage] = plan["synthesis"]
        elif minutes is not None:
            plan[stage] = steps_in(run.loop, network, job, config, minutes)
        else:
            plan[stage] = steps or max(1, round(config.epochs * job.data.steps_per_epoch))
        write_json(plan_path, plan)
    averaged = fit(run.loop, network, job, config, plan[stage])
    network.load_state_dict(averaged.state_dict())
    network.requires_grad_(False)
