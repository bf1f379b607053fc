"""The command line: one verb, one function. Heavy imports wait until a verb needs them."""

import io
import json
import math
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from crossmr.command import (
    EXPERT,
    MESSAGES,
    DdimSteps,
    Device,
    KeepNames,
    Names,
    Out,
    PartOption,
    Patients,
    Planes,
    Precision,
    RayOption,
    Register,
    RetryFailed,
    Samples,
    Seed,
    SeriesTable,
    Share,
    Summary,
    Targets,
    check_extra,
    check_paths,
    mapping_of,
    messages,
    modalities_of,
    pairs,
    part_of,
    speaks,
)
from crossmr.errors import ConfigError, CrossmrError, CrossmrWarning, Interrupted, OutputError
from crossmr.main_memory import keep_memory
from crossmr.parts import WORK
from crossmr.paths import check_completed, check_prepared
from crossmr.ranks import started
from crossmr.registry import find_model

if TYPE_CHECKING:
    from crossmr.completion.cohort import CohortSummary
    from crossmr.completion.inputs import PlannedCase
    from crossmr.display import Display
    from crossmr.evaluation.evaluate import EvaluationSettings

ORDER = (
    "complete",
    "status",
    "report",
    "view",
    "app",
    "evaluate",
    "prepare",
    "train",
    "models",
    "convert",
    "nnunet",
    "demo",
)
"""The commands as the help lists them: in the order in which they are used."""


CONTINUED = ("complete", "prepare", "train", "convert")
"""The commands that keep what is finished, so that the same command goes on after it was stopped."""


class Verbs(TyperGroup):
    """The commands of crossmr, in the order of use."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C becomes an error that says whether the same command goes on.

        Raises:
            Interrupted: on Ctrl-C.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            verb = ctx.invoked_subcommand
            goes_on = "goes on where it stopped" if verb in CONTINUED else "starts again"
            raise Interrupted(f"{verb} was stopped; the same command {goes_on}.") from error

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands, in the order of `ORDER`."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="crossmr",
    cls=Verbs,
    help="Synthesise the missing contrasts of brain MRI studies. Contrasts are t1n (T1), t1c (T1ce), t2w (T2) and t2f "
    "(FLAIR), in any usual spelling. Research use only; not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

NAMED = 8
"""Cases of a verdict that the terminal names; status.csv has them all."""


def _say_version(asked: bool) -> None:
    if asked:
        print(f"crossmr {version('crossmr')}, torch {version('torch')}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _common(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions of crossmr, torch and Python.", is_eager=True, callback=_say_version
        ),
    ] = False,
) -> None:
    """What comes before a command."""


@app.command()
@speaks()
def complete(
    study_or_cohort: Annotated[
        list[Path],
        typer.Argument(help="Folders of one study or of many, NIfTI or DICOM; or the NIfTI files of one study."),
    ],
    out: Out,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder or name of a model; by default the shipped model."),
    ] = None,
    targets: Targets = None,
    keep_names: KeepNames = False,
    guidance: Annotated[
        str | None,
        typer.Option(
            help="sample, unconditional, reference or none; by default what the model was trained with.",
            rich_help_panel=EXPERT,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Study whose acquired scans guide, with --guidance reference, e.g. an earlier visit.",
            rich_help_panel=EXPERT,
        ),
    ] = None,
    planes: Planes = None,
    ddim_steps: DdimSteps = 50,
    samples: Samples = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of finished cases.")] = False,
    scale: Annotated[
        str,
        typer.Option(help="Intensities: unit for [0, 1], input for a scale like that of the study's other volumes."),
    ] = "unit",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be synthesised from what; write nothing but --series-table."),
    ] = False,
    mapping: Names = None,
    series_table: SeriesTable = None,
    register: Register = False,
    profile: Annotated[
        str, typer.Option(help="Layout of OUT: labelled, challenge (BraSyn's flat folder) or bids (a BIDS derivative).")
    ] = "labelled",
    part: PartOption = None,
    ray: RayOption = None,
    retry_failed: RetryFailed = False,
    share: Share = False,
    *,
    display: "Display",
) -> Summary:
    """Synthesise the missing contrasts of one study or many. The same command again goes on where it stopped."""
    folders = [path for path in study_or_cohort if not os.path.isfile(path)]  # of a too long name, unlike Path.is_file
    check_paths(out=out, studies=[*folders, reference], models=[model])
    wanted, names, own = modalities_of(targets), mapping_of(mapping), part_of(part)
    from crossmr.completion.cluster import complete_on_ray
    from crossmr.completion.cohort import CohortSettings, Job, complete_cohort, plan_cohort
    from crossmr.completion.layout import Layout
    from crossmr.completion.work import Work, find_run
    from crossmr.display import LOG
    from crossmr.networks.inference import InferenceSettings
    from crossmr.output.report import report_completion

    settings = InferenceSettings(
        targets=wanted,
        guidance=guidance,  # type: ignore[arg-type]
        planes=planes,
        ddim_steps=ddim_steps,
        samples=samples,
        reference=reference,
        seed=seed,
        device=device,
        precision=precision,
        register="always" if register else "never",
        scale=scale,  # type: ignore[arg-type]
    )
    options = CohortSettings(names, overwrite, profile, keep_names, own, retry_failed, share, series_table)  # type: ignore[arg-type]
    if dry_run:
        planned = plan_cohort(study_or_cohort, out, model, settings, options, display=display)
        return _planned(planned, f"nothing but {series_table}" if series_table else "nothing")
    if ray is None:
        summary = complete_cohort(study_or_cohort, out, model, settings, options, display=display)
    else:
        summary = complete_on_ray(Job(study_or_cohort, out, model, settings, options), ray, display)
    records = Layout(out, options.profile).records
    if (left := find_run(out)) is not None and (not share or Work(left).others()):
        last = f"others work on it, or have not begun: crossmr status {out}"
    else:
        last = f"report: {report_completion(records)}"
    return Summary(
        summary.counts,
        summary.failed,
        f"in {out}; research use only",
        asdict(summary),
        lines=[*_outcomes(summary), last],
        log=records / LOG,
        doubtful="refuse" in summary.verdicts.values(),
    )


def _planned(planned: Sequence["PlannedCase"], written: str) -> Summary:
    """What would become of each study, and what was `written` meanwhile."""
    from crossmr.completion.choice import by_description

    outcomes = ("would fail", "not to be synthesised", "to be synthesised", "nothing to synthesise", "finished before")
    counts = {outcome: sum(case.outcome == outcome for case in planned) for outcome in outcomes}
    failures = {case.case: case.failed for case in planned if case.outcome == outcomes[0]}
    record = {"studies": [asdict(replace(case, described={})) for case in planned]}
    lines = [*(line for case in planned for line in case.lines()), *by_description(planned)]
    doubtful = any(case.unread for case in planned)
    unsure = "names and headers were read, images were not checked, so a study may still be refused"
    return Summary(counts, failures, f"{written} was written; {unsure}", record, lines, doubtful=doubtful)


def _outcomes(summary: "CohortSummary") -> Iterator[str]:
    """What became of each case that did not fail, line by line."""
    from crossmr.completion.study import ENHANCEMENT

    for case, modalities in summary.completed.items():
        yield f"{case}: synthesised {', '.join(modalities)}"
    for case, notes in summary.notes.items():
        grave = [note for note in notes if note in summary.reasons.get(case, ())]
        yield from (f"{case}: warning: {note}" for note in grave)
        if others := [note for note in notes if note not in grave]:
            yield f"{case}: note: {' '.join(others)}"
    for case, reasons in summary.not_filled.items():
        for modality, reason in reasons.items():
            yield f"{case}: {modality} not synthesised: {reason}"
    if summary.skipped:
        yield f"Studies that were finished before are skipped ({len(summary.skipped)}); --overwrite replaces them."
    if any("t1c" in modalities for modalities in summary.completed.values()):
        yield f"Note: {ENHANCEMENT}"
    for verdict in ("refuse", "look"):
        if cases := [case for case, its in summary.verdicts.items() if its == verdict]:
            more = f" and {len(cases) - NAMED} more" if len(cases) > NAMED else ""
            yield f"verdict {verdict}: {', '.join(cases[:NAMED])}{more}; status.csv has the reasons"
    if used := [*summary.verdicts.values()].count("use"):
        yield f"verdict use: {used} {'study' if used == 1 else 'studies'}"


@app.command()
def status(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that 'crossmr complete' writes or wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.", rich_help_panel=MESSAGES)] = False,
) -> None:
    """Say how far a cohort is: done, running, failed with reasons, left. Nothing is written."""
    from crossmr.completion.work import read_progress
    from crossmr.display import Display

    progress = read_progress(out)
    if as_json:
        print(json.dumps({**asdict(progress), "left": progress.left}, indent=2, ensure_ascii=False))
        return
    for line in progress.lines():
        Display().say(line)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that 'crossmr complete' or 'evaluate' wrote.")],
) -> None:
    """Write report.html anew; of a run that is not finished, status.csv too, of what there is."""
    from crossmr.completion.cohort import finish_cohort
    from crossmr.completion.work import find_run
    from crossmr.display import Display
    from crossmr.evaluation.measurements import measured_parts
    from crossmr.output.report import report_completion, report_evaluation

    if (out / "metrics.json").exists():
        page = report_evaluation(out)
    elif parts := measured_parts(out):
        raise OutputError(f"{out} holds an evaluation that is not finished: of its parts there are {', '.join(parts)}.")
    else:
        check_completed(out)
        if (layout := find_run(out)) is not None:
            finish_cohort(layout)
        page = report_completion(out)
    Display().say(f"report: {page}")


@app.command()
def view(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that 'crossmr complete' wrote.")],
    case: Annotated[str | None, typer.Argument(help="Case to show; by default the first.")] = None,
    scans: Annotated[
        Path | None,
        typer.Option(help="Folder of the acquired scans, if they have moved, or if they include the truth."),
    ] = None,
    mapping: Names = None,
    opened: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Show a completed study in a browser: acquired and synthetic volumes, and the truth where it is known."""
    check_completed(out)
    check_paths(studies=[scans])
    names = mapping_of(mapping)
    import webbrowser

    from crossmr.display import Display
    from crossmr.output.viewer import view_case

    page, notes = view_case(out, case, scans=scans, mapping=names)
    for note in notes:
        Display().say(f"Note: {note}")
    Display().say(f"{page}: one file, to be opened in any browser")
    if opened:
        webbrowser.open(page.resolve().as_uri())


@app.command("app")
def app_(
    host: Annotated[str, typer.Option(help="Address to listen on; by default this computer's alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any that is free.")] = 0,
    model: Annotated[Path | None, typer.Option(help="Folder or name of a model; by default the shipped model.")] = None,
    device: Device = "auto",
    limit_gib: Annotated[float, typer.Option("--limit-gib", help="GiB that one page may send.")] = 4.0,
    opened: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Serve a page on this computer: drop a study, complete it, look at it, download it."""
    check_paths(models=[model])
    check_extra("app", "starlette", "uvicorn")
    from crossmr.app.server import AppSettings, serve
    from crossmr.app.uploads import Limits
    from crossmr.display import Display

    limits = Limits(total=int(limit_gib * 2**30) if math.isfinite(limit_gib) else 0)
    serve(AppSettings(host, port, str(find_model(model)), device, opened, limits), Display())


@app.command()
@speaks()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, or the name of a registered one.")],
    data: Annotated[Path, typer.Argument(metavar="SET_OR_COHORT", help="A prepared set, or a folder of studies.")],
    out: Out,
    split: Annotated[
        str | None, typer.Option(help="Split of a prepared set: train, val or test, which is the default.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(help="How to measure: crossmr, brasyn (the challenge's) or published (whole scans)."),
    ] = "crossmr",
    segmenter: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="With brasyn, a command that segments {study} into {labels}: adds the Dice of its result.",
        ),
    ] = None,
    every_subset: Annotated[
        bool,
        typer.Option(
            "--every-subset",
            help="With a model of any subset: synthesise from every subset, not only from all but one.",
        ),
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Second model to measure on the same patients.")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Images that another program made of the studies, CASE-CONTRAST.nii.gz, to measure too; repeatable.",
        ),
    ] = None,
    guidance: Annotated[
        list[str] | None, typer.Option(help="Guidance to measure as well; repeatable.", rich_help_panel=EXPERT)
    ] = None,
    planes: Planes = None,
    ddim_steps: DdimSteps = 50,
    samples: Samples = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    mapping: Names = None,
    register: Register = False,
    patients: Patients = None,
    part: PartOption = None,
    *,
    display: "Display",
) -> Summary:
    """Measure a model: hide each target, synthesise it, and compare it with the truth and with baselines."""
    check_paths(out=out, studies=[data], models=[model, against])
    names, own = mapping_of(mapping), part_of(part)
    from crossmr.display import LOG
    from crossmr.evaluation.evaluate import EvaluationSettings, warnings_of
    from crossmr.evaluation.evaluate import evaluate as run
    from crossmr.evaluation.tables import tables, uncertainty_table
    from crossmr.networks.inference import InferenceSettings
    from crossmr.output.report import report_evaluation

    inference = InferenceSettings(
        planes=planes,
        ddim_steps=ddim_steps,
        samples=samples,
        seed=seed,
        device=device,
        precision=precision,
        register="always" if register else "never",
    )
    settings = EvaluationSettings(
        split=split,
        part=own,
        every_subset=every_subset,
        guidances=tuple(guidance or ()),  # type: ignore[arg-type]
        against=against,
        images={name: Path(folder) for name, folder in pairs(images, "--images", "unet=FOLDER", once=True).items()},
        inference=inference,
        mapping=names,
        patients=patients,
    )
    if protocol != "crossmr" or segmenter is not None:
        return _evaluate_by_protocol((model, data, out), settings, protocol, segmenter, display)
    result = run(model, data, out, settings, display=display)
    display.print_tables(tables(result["summary"], result["contrasts"], intervals=display.wide))
    if result["uncertainty"]:
        display.print_tables([uncertainty_table(result["uncertainty_by_target"])])
    waiting = f"part {own} is measured; others are not yet, or of other studies, models or settings"
    last = f"report: {report_evaluation(out)}" if result["finished"] else waiting
    lines = [*(f"Warning: {text}" for text in warnings_of(result)), last]
    counts = {"failed": len(result["failed"]), "measured": len(result["cases"])}
    record = {key: result[key] for key in ("summary", "contrasts", "uncertainty", "overlap", "model_sha256")}
    where = f"every number is in {out}"
    if not result["finished"]:
        where = f"kept in {out / WORK} until all parts are measured"
        where += f"; {out} still holds an earlier evaluation" * (out / "metrics.json").exists()
    nothing = 0 in result["images"].values()
    return Summary(counts, result["failed"], where, record, lines, out / LOG, doubtful=nothing)


def _evaluate_by_protocol(
    paths: tuple[Path, Path, Path],
    settings: "EvaluationSettings",
    protocol: str,
    segmenter: str | None,
    display: "Display",
) -> Summary:
    """Measure by another protocol than ours; `paths` are the model, the data and OUT."""
    from crossmr.display import LOG
    from crossmr.evaluation.challenge import ProtocolSettings, evaluate_by_protocol, warnings_of
    from crossmr.evaluation.segmenter import Segmenter
    from crossmr.evaluation.tables import other_tables

    if protocol == "crossmr":
        raise ConfigError("--segmenter is for --protocol brasyn.")
    command = None if segmenter is None else Segmenter(segmenter)
    chosen = ProtocolSettings(protocol, command, settings)  # type: ignore[arg-type]
    result = evaluate_by_protocol(*paths, chosen, display=display)
    display.print_tables(other_tables(protocol, result["summary"]))
    counts = {"failed": len(result["failed"]), "measured": len(result["cases"])}
    record = {key: result[key] for key in ("summary", "overlap", "model_sha256")}
    lines = [f"Warning: {text}" for text in warnings_of(result)]
    out = paths[2]
    nothing, where = 0 in result["images"].values(), f"every number is in {out}"
    return Summary(counts, result["failed"], where, record, lines, out / LOG, doubtful=nothing)


@app.command()
@speaks()
def prepare(
    cohort: Annotated[
        list[Path], typer.Argument(help="Folders of studies; file names say the contrasts, or --map does.")
    ],
    out: Out,
    split: Annotated[str, typer.Option(help="Percent of patients for training, validation and test.")] = "70/10/20",
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(help="Number of processes; 0 for one per processor.")] = 0,
    mapping: Names = None,
    register: Register = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete prepared cases that are not in the cohorts any more.")
    ] = False,
    patients: Patients = None,
    *,
    display: "Display",
) -> Summary:
    """Check, normalise and crop a cohort into a prepared dataset. The same command again goes on where it stopped."""
    check_paths(out=out, studies=cohort)
    names = mapping_of(mapping)
    from crossmr.data.prepare import PrepareSettings, default_workers, lesions_in_words
    from crossmr.data.prepare import prepare as run
    from crossmr.data.split import Split
    from crossmr.display import LOG

    settings = PrepareSettings(
        names,
        Split.parse(split, seed),
        "always" if register else "never",
        workers or default_workers(),
        prune,
        patients,
    )
    manifest = run(cohort, out, settings, display=display)
    found, parts = manifest["fingerprint"], manifest["split"]
    counts = ", ".join(f"{part} {len(parts[part])}" for part in ("train", "val", "test"))
    lines = (
        f"{found['studies']} studies of {found['patients']} patients ({counts})",
        "contrasts: " + ", ".join(f"{m} {n}" for m, n in found["modalities"].items()),
        f"lesion labels: {lesions_in_words(found)}",
    )
    failed = {entry["case"]: entry["reason"] for entry in manifest["refused"]}
    outcomes = {"failed": len(failed), "prepared": found["studies"]}
    return Summary(outcomes, failed, f"in {out}", {"fingerprint": found, "split": parts}, lines, out / LOG)


@app.command()
@speaks("quiet", "debug")
def train(
    prepared: Annotated[Path, typer.Argument(metavar="SET", help="Dataset that 'crossmr prepare' wrote.")],
    out: Out,
    recipe: Annotated[
        str | None, typer.Option(help="standard, any, paper or tiny; by default standard, or the recipe of --start.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="Model to start from, e.g. 'default'."),
    ] = None,
    sources: Annotated[
        list[str] | None, typer.Option(help="Contrasts to synthesise from, e.g. t1n,t2w or T1,T2; repeatable.")
    ] = None,
    targets: Targets = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Stage to train, instead of all: representation, distribution, synthesis or guidance; repeatable.",
            rich_help_panel=EXPERT,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every stage.", rich_help_panel=EXPERT)] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes that the whole training may take.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Setting of the recipe to change, e.g. synthesis.channels=32; repeatable.",
            rich_help_panel=EXPERT,
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = 0,
    *,
    display: "Display",
) -> None:
    """Train a model. The same command again goes on where it stopped."""
    messages.silent = not (first := started().first)
    check_prepared(prepared)
    check_paths(out=out if first else None, models=[start])
    task, changes = (modalities_of(sources), modalities_of(targets)), pairs(settings, "--set", "synthesis.channels=32")

    from crossmr.display import LOG, SILENT

    display = display if first else SILENT
    display.say(f"training on {prepared} in {out}")  # PyTorch takes seconds to load
    from crossmr.config import with_settings
    from crossmr.registry import load_model
    from crossmr.training.recipes import RECIPES, recipe_of
    from crossmr.training.run import train as run
    from crossmr.training.settings import TrainingSettings

    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(f"--recipe is '{recipe}'; expected one of {', '.join(RECIPES)}.")
    initial_model = None if start is None else load_model(start, "cpu")
    chosen = RECIPES[recipe or "standard"] if recipe is not None or initial_model is None else recipe_of(initial_model)
    open_settings = tuple(name for name in chosen.by_set if name not in changes)
    training = TrainingSettings(
        recipe=with_settings(replace(chosen, by_set=open_settings), changes),
        sources=task[0],
        targets=task[1],
        stages=None if stage is None else tuple(stage),
        steps=steps,
        minutes=minutes,
        device=device,
        precision=precision,
        seed=seed,
    )
    model = run(prepared, out, training, initial_model=initial_model, display=display)
    if not first:
        return
    found = f"model: {model}" if (model / "config.json").exists() else f"no model yet: {model} needs every stage"
    display.log_to(out / LOG).say(found)


models = typer.Typer(help="List, verify, import, export and remove registered models.")
app.add_typer(models, name="models")


@models.callback(invoke_without_command=True)
def list_models(context: typer.Context) -> None:
    """List the registered models."""
    if context.invoked_subcommand:
        return
    from crossmr.display import Display
    from crossmr.files import read_json
    from crossmr.registry import known_models, models_folder

    display, known = Display(), known_models()
    for name, entry in known.items():
        try:
            config = read_json(entry.folder / "config.json")
            sources, targets = (config["config"][key] for key in ("sources", "targets"))
        except (CrossmrError, KeyError, TypeError):
            display.say(f"{name}: damaged; see: crossmr models verify {name}")
            continue
        what = f"any of {', '.join(targets)}" if sources == targets else f"{', '.join(sources)} → {', '.join(targets)}"
        size = sum(path.stat().st_size for path in entry.folder.iterdir()) / 2**20
        kind = "shipped" if entry.shipped else "imported"
        display.say(f"{name}: {what}; {kind}, {size:.1f} MiB, {str(config.get('sha256'))[:12]}")
    if not known:
        display.say(f"no registered models; imported ones live in {models_folder()}")


@models.command()
def verify(name: Annotated[str | None, typer.Argument(help="Name or folder; by default all.")] = None) -> None:
    """Check all hashes and weights of a model, or of every registered one."""
    from crossmr.display import Display
    from crossmr.registry import known_models, load_model

    broken = {}
    for one in [name] if name else list(known_models()):
        try:
            record = load_model(one, "cpu").record
            Display().say(f"{one}: whole, {record['sha256'][:12]}")
        except CrossmrError as error:
            broken[one] = str(error)
    for one, reason in broken.items():
        Display().say_failure(f"{one} failed: {reason}")
    if broken:
        raise typer.Exit(1)


@models.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An exported model, or a model's folder.")],
    name: Annotated[
        str | None, typer.Option(help="Name to register it under; by default that of the file or the run.")
    ] = None,
) -> None:
    """Check a model and register it, for --model NAME."""
    from crossmr.display import Display
    from crossmr.registry import import_model

    known = import_model(file, name)
    Display().say(f"{known.name}: imported to {known.folder}")


@models.command()
def export(
    model: Annotated[str, typer.Argument(help="Name or folder of a model.")],
    file: Annotated[Path, typer.Argument(help="The zip file to write.")],
    with_patients: Annotated[
        bool, typer.Option("--with-patients", help="Also the list of whom it was trained on, as slow, salted hashes.")
    ] = False,
) -> None:
    """Check a model and write it to one file."""
    from crossmr.display import Display
    from crossmr.registry import export_model

    exported = export_model(model, file, with_patients=with_patients)
    Display().say(f"{file}: {model}, {exported.record['sha256'][:12]}")
    if exported.patients and not with_patients:
        Display().say("excluded: the list of hashes of the patients it was trained on; --with-patients adds it")


@models.command()
def remove(name: Annotated[str, typer.Argument(help="An imported model.")]) -> None:
    """Delete an imported model."""
    from crossmr.display import Display
    from crossmr.registry import remove_model

    remove_model(name)
    Display().say(f"{name}: removed")


@app.command()
@speaks()
def convert(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM, of any number of patients.")],
    out: Out,
    keep_names: KeepNames = False,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="CONTRAST=GLOB",
            help="Say which series descriptions are a contrast, e.g. --map t1c='*GD*'; repeatable.",
        ),
    ] = None,
    series_table: Annotated[
        Path | None,
        typer.Option(
            "--series-table",
            metavar="CSV",
            help="Take the series as this table says, which 'complete --dry-run --series-table' has written.",
        ),
    ] = None,
    part: PartOption = None,
    *,
    display: "Display",
) -> Summary:
    """Sort DICOM and convert it to studies of NIfTI for the other commands; 'complete' also takes DICOM itself."""
    check_paths(out=out, studies=[folder])
    names, own = mapping_of(mapping), part_of(part)
    from crossmr.dicom.convert import convert as run
    from crossmr.display import LOG

    found = run(folder, out, mapping=names, keep_names=keep_names, part=own, series_table=series_table, display=display)
    lines = [line for one in found for line in (*one.lines(), *(f"{one.case}: warning: {note}" for note in one.notes))]
    failed = {one.case: one.refused for one in found if one.refused}
    counts = {"failed": len(failed), "converted": len(found) - len(failed)}
    return Summary(counts, failed, f"in {out}", {"studies": {one.case: one.record for one in found}}, lines, out / LOG)


@app.command()
@speaks()
def nnunet(
    cohort: Annotated[Path, typer.Argument(help="Folder of the studies that were completed.")],
    completed: Annotated[Path, typer.Argument(help="Folder that 'crossmr complete' wrote.")],
    out: Out,
    modalities: Annotated[
        list[str] | None,
        typer.Option(
            help="Contrasts that become channels, in this order; by default all that any case has; repeatable."
        ),
    ] = None,
    mapping: Names = None,
    *,
    display: "Display",
) -> Summary:
    """Write acquired and synthetic volumes as a dataset for nnU-Net."""
    check_completed(completed)
    check_paths(out=out, studies=[cohort])
    wanted, names = modalities_of(modalities), mapping_of(mapping)
    from crossmr.output.nnunet import export_nnunet

    record = export_nnunet(cohort, completed, out, modalities=wanted, mapping=names)
    filled = sum(bool(channels) for channels in record["synthetic"].values())
    lines = [f"channels: {', '.join(record['channels'])}; {filled} cases have synthetic ones"]
    counts = {"excluded": len(record["left_out"]), "written": len(record["synthetic"])}
    return Summary(counts, record["left_out"], f"in {out}", record, lines)


@app.command()
def demo(out: Out, seed: Seed = 0) -> None:
    """Try everything on phantoms in minutes: complete one, then prepare, train, complete and evaluate."""
    check_paths(out=out)
    from crossmr.demo import demo as run
    from crossmr.display import Display

    run(out, seed=seed, display=Display())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default the program's own; errors that crossmr raises on purpose are one line.

    Exit codes: 0, 1 where a study failed or is refused, 2 where the command line is not understood, 130 after Ctrl-C.
    """
    keep_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads would spin against neighbours
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a file's name may be no Unicode
    messages.quiet = messages.debug = messages.as_json = messages.silent = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            app(args=arguments, prog_name="crossmr")
    except CrossmrError as error:
        if messages.debug:
            traceback.print_exc()
        if not messages.silent:
            print(" ".join(f"crossmr: {error}".split()), file=sys.stderr)
        if messages.as_json:
            print(json.dumps({"error": str(error)}, ensure_ascii=False))
        sys.exit(130 if isinstance(error, Interrupted) else 1)


def _show_warning(usual: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """Print crossmr's own warnings as one line, and others as usual."""
    if issubclass(category, CrossmrWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        usual(message, category, *rest)
