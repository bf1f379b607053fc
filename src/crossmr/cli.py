"""The command line: one verb, one function. Heavy imports wait until a verb needs them."""

import ctypes
import io
import json
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from crossmr.errors import ConfigError, CrossmrError, CrossmrWarning, Interrupted
from crossmr.paths import check_completed, check_output, check_prepared, check_studies

if TYPE_CHECKING:
    from crossmr.completion.cohort import CohortSummary
    from crossmr.completion.inputs import PlannedCase
    from crossmr.display import Display

ORDER = ("complete", "view", "evaluate", "prepare", "train", "models", "convert", "nnunet", "demo")
"""The commands as the help lists them: in the order in which they are used."""


CONTINUED = ("complete", "prepare", "train", "convert")
"""The commands that keep what is finished, so that the same command goes on after it was stopped."""


@dataclass
class Messages:
    """How one call speaks to who called it."""

    debug: bool = False
    as_json: bool = False

    def display(self, quiet: bool, debug: bool, as_json: bool = False) -> "Display":
        """Take over a command's options; returns where its messages go."""
        from crossmr.display import Display

        self.debug, self.as_json = debug, as_json
        return Display(quiet=quiet, debug=debug, stderr=as_json)


messages = Messages()


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
KEPT = 2**30
"""Bytes: freed memory up to this is kept, and blocks up to this come from it."""
DICOM, EXPERT, MESSAGES = "DICOM", "Expert", "Messages"
"""Panels of the help."""

Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")]
Targets = Annotated[
    str | None, typer.Option(help="Contrasts to synthesise, e.g. t1c,t2f or T1ce,FLAIR; by default every one.")
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="CONTRAST=GLOB",
        help="Say which file names are a contrast, e.g. --map t1n='*_MPRAGE.nii.gz'; repeatable.",
    ),
]
Register = Annotated[
    bool, typer.Option("--register", help="Register each study's volumes rigidly to its first one (SimpleITK).")
]
Patients = Annotated[
    Path | None,
    typer.Option(metavar="CSV", help="Whose each study is: columns case, patient and, to fix the splits, part."),
]
KeepNames = Annotated[
    bool,
    typer.Option(
        "--keep-names", help="Name cases by patient ID and date instead of pseudonyms.", rich_help_panel=DICOM
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but failures.", rich_help_panel=MESSAGES)]
Debug = Annotated[
    bool, typer.Option("--debug", help="Print the traceback of every error, too.", rich_help_panel=MESSAGES)
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print a summary as JSON; all other text goes to stderr.", rich_help_panel=MESSAGES),
]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", rich_help_panel=EXPERT)]
Precision = Annotated[
    str,
    typer.Option(help="auto (bfloat16 if the hardware has it), bfloat16 or float32.", rich_help_panel=EXPERT),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Number of guided syntheses to average, with --guidance sample.", rich_help_panel=EXPERT),
]
DdimSteps = Annotated[
    int, typer.Option("--ddim-steps", help="DDIM steps that sample the guidance.", rich_help_panel=EXPERT)
]


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
        bool, typer.Option("--dry-run", help="Say what would be synthesised from what, and write nothing.")
    ] = False,
    mapping: Names = None,
    register: Register = False,
    profile: Annotated[
        str, typer.Option(help="Layout of OUT: labelled, challenge (BraSyn's flat folder) or bids (a BIDS derivative).")
    ] = "labelled",
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Synthesise the missing contrasts of one study or many. The same command again goes on where it stopped."""
    display = messages.display(quiet, debug, as_json)
    for path in study_or_cohort:
        if not os.path.isfile(path):  # unlike Path.is_file, of a name that is too long as well
            check_studies(path)
    if reference is not None:
        check_studies(reference)
    check_output(out)
    _check_model(model)
    wanted, names = _modalities(targets), _mapping(mapping)
    from crossmr.completion.cohort import CohortSettings, complete_cohort, plan_cohort
    from crossmr.display import LOG
    from crossmr.networks.inference import Settings
    from crossmr.output.report import report_completion

    settings = Settings(
        targets=wanted,
        guidance=guidance,  # type: ignore[arg-type]
        ddim_steps=ddim_steps,
        samples=samples,
        reference=reference,
        seed=seed,
        device=device,
        precision=precision,
        register=_register(register),
        scale=scale,  # type: ignore[arg-type]
    )
    options = CohortSettings(names, overwrite, profile, keep_names)  # type: ignore[arg-type]
    if dry_run:
        _finish_plan(display, plan_cohort(study_or_cohort, out, model, settings, options, display=display))
        return
    summary = complete_cohort(study_or_cohort, out, model, settings, options, display=display)
    page = report_completion(out)
    display = display.log_to(page.with_name(LOG))
    _say_summary(summary, display)
    display.say(f"report: {page}")
    _finish(
        display,
        summary.counts,
        summary.failed,
        f"in {out}; research use only",
        asdict(summary),
        doubtful="refuse" in summary.verdicts.values(),
    )


def _finish_plan(display: "Display", planned: Sequence["PlannedCase"]) -> None:
    """Say what would become of each study, and count."""
    for line in (line for case in planned for line in case.lines()):
        display.say(line)
    outcomes = ("would fail", "not to be synthesised", "to be synthesised", "already complete", "finished before")
    counts = {outcome: sum(case.outcome == outcome for case in planned) for outcome in outcomes}
    failures = {case.case: case.failed for case in planned if case.outcome == outcomes[0]}
    record = {"studies": [asdict(case) for case in planned]}
    _finish(display, counts, failures, "nothing was written", record, doubtful=any(case.unread for case in planned))


def _say_summary(summary: "CohortSummary", display: "Display") -> None:
    """What became of each case that did not fail."""
    from crossmr.completion.study import ENHANCEMENT

    for case, modalities in summary.completed.items():
        display.say(f"{case}: synthesised {', '.join(modalities)}")
    for case, notes in summary.notes.items():
        for note in notes:
            display.say(f"{case}: warning: {note}")
    for case, reasons in summary.not_filled.items():
        for modality, reason in reasons.items():
            display.say(f"{case}: {modality} not synthesised: {reason}")
    if summary.skipped:
        display.say(
            f"Studies that were finished before are skipped ({len(summary.skipped)}); --overwrite replaces them."
        )
    if any("t1c" in modalities for modalities in summary.completed.values()):
        display.say(f"Note: {ENHANCEMENT}")
    for verdict in ("refuse", "look"):
        if cases := [case for case, its in summary.verdicts.items() if its == verdict]:
            more = f" and {len(cases) - NAMED} more" if len(cases) > NAMED else ""
            display.say(f"verdict {verdict}: {', '.join(cases[:NAMED])}{more}; status.csv has the reasons")
    if used := [*summary.verdicts.values()].count("use"):
        display.say(f"verdict use: {used} {'study' if used == 1 else 'studies'}")


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
    if scans is not None:
        check_studies(scans)
    names = _mapping(mapping)
    import webbrowser

    from crossmr.display import Display
    from crossmr.output.viewer import view_case

    page, notes = view_case(out, case, scans=scans, mapping=names)
    for note in notes:
        Display().say(f"Note: {note}")
    Display().say(f"{page}: one file, to be opened in any browser")
    if opened:
        webbrowser.open(page.resolve().as_uri())


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, or the name of a registered one.")],
    data: Annotated[Path, typer.Argument(metavar="SET_OR_COHORT", help="A prepared set, or a folder of studies.")],
    out: Out,
    part: Annotated[str, typer.Option(help="Split of a prepared set: train, val or test.")] = "test",
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
    guidance: Annotated[
        list[str] | None, typer.Option(help="Guidance to measure as well; repeatable.", rich_help_panel=EXPERT)
    ] = None,
    ddim_steps: DdimSteps = 50,
    samples: Samples = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    mapping: Names = None,
    register: Register = False,
    patients: Patients = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model: hide each target, synthesise it, and compare it with the truth and with baselines."""
    display = messages.display(quiet, debug, as_json)
    _check_model(model)
    if against is not None:
        _check_model(against)
    check_studies(data)
    check_output(out)
    names = _mapping(mapping)
    from crossmr.display import LOG
    from crossmr.evaluation.evaluate import EvaluationSettings, overlap_warnings
    from crossmr.evaluation.evaluate import evaluate as run
    from crossmr.evaluation.tables import tables, uncertainty_table
    from crossmr.networks.inference import Settings
    from crossmr.output.report import report_evaluation

    inference = Settings(
        ddim_steps=ddim_steps,
        samples=samples,
        seed=seed,
        device=device,
        precision=precision,
        register=_register(register),
    )
    settings = EvaluationSettings(
        split=part,
        every_subset=every_subset,
        guidances=tuple(guidance or ()),  # type: ignore[arg-type]
        against=against,
        inference=inference,
        mapping=names,
        patients=patients,
    )
    result = run(model, data, out, settings, display=display)
    display = display.log_to(out / LOG)
    display.print_tables(tables(result["summary"], result["contrasts"], intervals=display.wide))
    if result["uncertainty"]:
        display.print_tables([uncertainty_table(result["uncertainty"])])
    for warning in overlap_warnings(result):
        display.say(f"Warning: {warning}")
    display.say(f"report: {report_evaluation(out)}")
    counts = {"failed": len(result["failed"]), "measured": len(result["cases"])}
    record = {key: result[key] for key in ("summary", "contrasts", "uncertainty", "overlap", "model_sha256")}
    _finish(display, counts, result["failed"], f"every number is in {out}", record)


@app.command()
def prepare(
    cohort: Annotated[
        list[Path], typer.Argument(help="Folders of studies, named as in BraTS, UPenn-GBM, IXI or BIDS.")
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
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Check, normalise and crop a cohort into a prepared dataset. The same command again goes on where it stopped."""
    display = messages.display(quiet, debug, as_json)
    for folder in cohort:
        check_studies(folder)
    check_output(out)
    names = _mapping(mapping)
    from crossmr.data.prepare import PrepareSettings, Split, default_workers
    from crossmr.data.prepare import prepare as run
    from crossmr.display import LOG

    settings = PrepareSettings(
        names, Split.parse(split, seed), _register(register), workers or default_workers(), prune, patients
    )
    manifest = run(cohort, out, settings, display=display)
    display = display.log_to(out / LOG)
    found, parts = manifest["fingerprint"], manifest["split"]
    counts = ", ".join(f"{part} {len(parts[part])}" for part in ("train", "val", "test"))
    display.say(f"{found['studies']} studies of {found['patients']} patients ({counts})")
    display.say("contrasts: " + ", ".join(f"{m} {n}" for m, n in found["modalities"].items()))
    failed = {entry["case"]: entry["reason"] for entry in manifest["refused"]}
    record = {"fingerprint": found, "split": parts}
    _finish(display, {"failed": len(failed), "prepared": found["studies"]}, failed, f"in {out}", record)


@app.command()
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
    sources: Annotated[str | None, typer.Option(help="Contrasts to synthesise from, e.g. t1n,t2w or T1,T2.")] = None,
    targets: Targets = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Stage to train, instead of all; repeatable.", rich_help_panel=EXPERT)
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
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model. The same command again goes on where it stopped."""
    display = messages.display(quiet, debug)
    check_prepared(prepared)
    check_output(out)
    if start is not None:
        _check_model(start)
    task, changes = (_modalities(sources), _modalities(targets)), _pairs(settings, "--set", "synthesis.channels=32")

    display.say(f"training on {prepared} in {out}")  # PyTorch takes seconds to load
    from dataclasses import replace

    from crossmr.config import with_settings
    from crossmr.networks.model import load_model
    from crossmr.registry import find_model
    from crossmr.training.recipes import RECIPES, recipe_of
    from crossmr.training.run import TrainingSettings
    from crossmr.training.run import train as run

    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(f"--recipe is '{recipe}'; expected one of {', '.join(RECIPES)}.")
    initial_model = None if start is None else load_model(find_model(start))
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
    display.say(f"model: {model}" if (model / "config.json").exists() else f"no model yet: {model} needs every stage")


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
    from crossmr.registry import find_model, known_models

    broken = {}
    for one in [name] if name else list(known_models()):
        try:
            folder = find_model(one)
            from crossmr.networks.model import load_model

            record = load_model(folder).record
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
    name: Annotated[str | None, typer.Option(help="Name to register it under; by default the file's name.")] = None,
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
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Sort DICOM and convert it to studies of NIfTI for the other commands; 'complete' also takes DICOM itself."""
    display = messages.display(quiet, debug, as_json)
    check_studies(folder)
    check_output(out)
    names = _mapping(mapping)
    from crossmr.dicom.convert import convert as run
    from crossmr.display import LOG

    found = run(folder, out, mapping=names, keep_names=keep_names, display=display)
    display = display.log_to(out / LOG)
    for scans in found:
        for line in scans.lines():
            display.say(line)
        for note in scans.notes:
            display.say(f"{scans.case}: warning: {note}")
    failed = {scans.case: scans.refused for scans in found if scans.refused}
    counts = {"failed": len(failed), "converted": len(found) - len(failed)}
    _finish(display, counts, failed, f"in {out}", {"studies": {scans.case: scans.record for scans in found}})


@app.command()
def nnunet(
    cohort: Annotated[Path, typer.Argument(help="Folder of the studies that were completed.")],
    completed: Annotated[Path, typer.Argument(help="Folder that 'crossmr complete' wrote.")],
    out: Out,
    modalities: Annotated[
        str | None,
        typer.Option(help="Contrasts that become channels, in this order; by default all that any case has."),
    ] = None,
    mapping: Names = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Write acquired and synthetic volumes as a dataset for nnU-Net."""
    display = messages.display(quiet, debug, as_json)
    check_studies(cohort)
    check_completed(completed)
    check_output(out)
    wanted, names = _modalities(modalities), _mapping(mapping)
    from crossmr.output.nnunet import export_nnunet

    record = export_nnunet(cohort, completed, out, modalities=wanted, mapping=names)
    filled = sum(bool(channels) for channels in record["synthetic"].values())
    channels = ", ".join(record["channels"])
    excluded = record["left_out"]
    display.say(f"channels: {channels}; {filled} cases have synthetic ones")
    counts = {"excluded": len(excluded), "written": len(record["synthetic"])}
    _finish(display, counts, excluded, f"in {out}", record)


@app.command()
def demo(out: Out, seed: Seed = 0) -> None:
    """Try everything on phantoms in minutes: complete one, then prepare, train, complete and evaluate."""
    check_output(out)
    from crossmr.demo import demo as run
    from crossmr.display import Display

    run(out, seed=seed, display=Display())


def keep_memory() -> None:
    """Let glibc keep what is freed: it would map every layer's output anew, and the system clear it page by page."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
            mallopt(option, KEPT)


def main() -> None:
    """Run the command line; errors that crossmr raises on purpose are one line, and the exit code is 1."""
    keep_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads would spin against neighbours
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a file's name may be no Unicode
    messages.debug = messages.as_json = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            app()
    except CrossmrError as error:
        if messages.debug:
            traceback.print_exc()
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


def _finish(
    display: "Display",
    counts: Mapping[str, int],
    failures: Mapping[str, str],
    where: str,
    record: Mapping[str, Any],
    *,
    doubtful: bool = False,
) -> None:
    """Name each failure; say in one sentence what became of all studies, failures first; exit with 1 if there are any.

    So it does where something is `doubtful`: a contrast that was wanted was refused.
    `counts` is outcome → number; the first outcome is that of `failures`. With --json all of it, and `record`, is one
    JSON object on the standard output.
    """
    word, *others = counts
    for case, reason in failures.items():
        display.say_failure(f"{case} {word}: {reason}")
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in (word, *(o for o in others if counts[o])))
    total = sum(counts.values())
    display.say(f"{total} {'study' if total == 1 else 'studies'}: {told}; {where}")
    if messages.as_json:
        print(json.dumps({**record, "counts": dict(counts), word: dict(failures)}, indent=2, ensure_ascii=False))
    if failures or doubtful:
        raise typer.Exit(1)


def _check_model(model: Path | None) -> None:
    """Refuse a name or folder that is not a model, before PyTorch is imported."""
    from crossmr.registry import find_model

    find_model(model)


def _pairs(items: list[str] | None, option: str, example: str) -> dict[str, str]:
    pairs = {}
    for item in items or ():
        key, separator, value = item.partition("=")
        if not separator or not key or not value:
            raise ConfigError(f"{option} is '{item}'; expected KEY=VALUE, such as {example}.")
        pairs[key.strip()] = value.strip()
    return pairs


def _mapping(items: list[str] | None) -> dict[str, str] | None:
    return _pairs(items, "--map", "t1n='*_MPRAGE.nii.gz'") or None


def _modalities(text: str | None) -> tuple[str, ...] | None:
    from crossmr.data.naming import modality_name

    return None if text is None else tuple(modality_name(part.strip()) for part in text.split(","))


def _register(register: bool) -> Any:
    return "always" if register else "never"
