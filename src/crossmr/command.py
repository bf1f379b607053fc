"""What the commands of the command line share: their options, and how they speak."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossmr.errors import ConfigError
from crossmr.paths import check_output, check_studies
from crossmr.registry import find_model

if TYPE_CHECKING:
    from crossmr.display import Display
    from crossmr.parts import Part

DICOM, EXPERT, MACHINES, MESSAGES = "DICOM", "Expert", "Many machines", "Messages"
"""Panels of the help."""


@dataclass
class Messages:
    """How the command that runs speaks to who called it."""

    quiet: bool = False
    debug: bool = False
    as_json: bool = False
    silent: bool = False
    """Whether another process of the same job says why it failed."""


messages = Messages()


def _message_option(flag: str, text: str) -> Any:
    return Annotated[bool, typer.Option(flag, help=text, rich_help_panel=MESSAGES)]


MESSAGE_OPTIONS = {
    "quiet": _message_option("--quiet", "Print nothing but failures."),
    "debug": _message_option("--debug", "Print the traceback of every error, too."),
    "as_json": _message_option("--json", "Print a summary as JSON; all other text goes to stderr."),
}
"""Attribute of `messages` → the option that sets it."""

Out = Annotated[Path, typer.Option("-o", "--out", help="Output folder.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="Contrasts to synthesise, e.g. t1c,t2f or T1ce,FLAIR; by default every one; repeatable."),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="CONTRAST=GLOB",
        help="Say which files, or which DICOM series, are a contrast, e.g. --map t1n='*_MPRAGE.nii.gz'; repeatable.",
    ),
]
SeriesTable = Annotated[
    Path | None,
    typer.Option(
        "--series-table",
        metavar="CSV",
        help="Take DICOM series as this table says; --dry-run writes it, for you to correct, or adds what it lacks.",
        rich_help_panel=DICOM,
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
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", rich_help_panel=EXPERT)]
Precision = Annotated[
    str,
    typer.Option(help="auto (bfloat16 if the hardware has it), bfloat16 or float32.", rich_help_panel=EXPERT),
]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="K/N",
        help="Do the K-th of N parts; any number of processes may share OUT this way, on any number of machines.",
        rich_help_panel=MACHINES,
    ),
]
Share = Annotated[
    bool,
    typer.Option(
        "--share",
        help="Let other calls complete other studies into OUT at the same time; the last one sums up.",
        rich_help_panel=MACHINES,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Complete on a Ray cluster: auto (the one that runs here), HOST:PORT, or local (a new one, here alone).",
        rich_help_panel=MACHINES,
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="With --part or --ray, also try what failed before in this run; other calls always do.",
        rich_help_panel=MACHINES,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Number of guided syntheses to average, with --guidance sample.", rich_help_panel=EXPERT),
]
Planes = Annotated[
    int | None,
    typer.Option(
        help="1: axial slices alone, in a third of the time; by default all planes that the model has learnt.",
        rich_help_panel=EXPERT,
    ),
]
DdimSteps = Annotated[
    int, typer.Option("--ddim-steps", help="DDIM steps that sample the guidance.", rich_help_panel=EXPERT)
]


@dataclass(frozen=True)
class Summary:
    """What became of all studies of one call."""

    counts: Mapping[str, int]
    """Outcome → number of studies, failures first."""
    failures: Mapping[str, str]
    """Case → why it had the first outcome."""
    where: str
    """Where the results are."""
    record: Mapping[str, Any]
    """What --json prints beside counts and failures."""
    lines: Iterable[str] = ()
    """What is to be said first."""
    log: Path | None = None
    """The log that keeps what is said."""
    doubtful: bool = False
    """Whether what was not used may be what is missing."""

    def say(self, display: "Display") -> None:
        """Name each failure; count all studies in one sentence, failures first; exit with 1 if any failed, or in doubt.

        With --json all of it, and `record`, is one JSON object on the standard output.
        """
        if self.log is not None:
            display = display.log_to(self.log)
        for line in self.lines:
            display.say(line)
        word, *others = self.counts
        for case, reason in self.failures.items():
            display.say_failure(f"{case} {word}: {reason}")
        told = ", ".join(f"{self.counts[one]} {one}" for one in (word, *(o for o in others if self.counts[o])))
        total = sum(self.counts.values())
        display.say(f"{total} {'study' if total == 1 else 'studies'}: {told}; {self.where}")
        if messages.as_json:
            body = {**self.record, "counts": dict(self.counts), word: dict(self.failures)}
            print(json.dumps(body, indent=2, ensure_ascii=False))
        if self.failures or self.doubtful:
            raise typer.Exit(1)


def speaks(*options: str) -> Callable[[Callable[..., Summary | None]], Callable[..., None]]:
    """Give a command these of MESSAGE_OPTIONS, by default all, in place of its last parameter, `display`.

    The command is given the display that they make, and the summary that it returns is said there.
    """
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=MESSAGE_OPTIONS[name])
        for name in options or MESSAGE_OPTIONS
    ]

    def decorate(command: Callable[..., Summary | None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            from crossmr.display import Display

            for option in shared:
                setattr(messages, option.name, given.pop(option.name))
            display = Display(quiet=messages.quiet, debug=messages.debug, stderr=messages.as_json)
            if (summary := command(**given, display=display)) is not None:
                summary.say(display)

        *own, _ = signature(command).parameters.values()
        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]  # which Typer reads, and these:
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        return run

    return decorate


def check_paths(
    *, out: Path | None = None, studies: Sequence[Path | None] = (), models: Sequence[Path | None] = ()
) -> None:
    """Refuse wrong paths before PyTorch is imported, which takes seconds; None is what was not given.

    Raises:
        CrossmrError: the first of them, in one line.
    """
    for model in models:
        if model is not None:
            find_model(model)
    for folder in studies:
        if folder is not None:
            check_studies(folder)
    if out is not None:
        check_output(out)


def check_extra(extra: str, *modules: str) -> None:
    """Refuse a command whose extra is not installed.

    Raises:
        ConfigError: one of its modules is not there.
    """
    if absent := [module for module in modules if find_spec(module) is None]:
        raise ConfigError(f'{" and ".join(absent)} not installed. Install with: pip install "crossmr[{extra}]"')


def pairs(
    items: Sequence[str] | None, option: str, example: str, *, joined_by: str = "", once: bool = False
) -> dict[str, str]:
    """Read KEY=VALUE as often as an option was given; of a key that comes twice the last, or all values, joined.

    Raises:
        ConfigError: one that is none, or that comes twice with other values where each may come `once`.
    """
    read = dict[str, str]()
    for item in items or ():
        key, separator, value = item.partition("=")
        if not separator or not key or not value:
            raise ConfigError(f"{option} is '{item}'; expected KEY=VALUE, such as {example}.")
        key, value = key.strip(), value.strip()
        if once and read.get(key, value) != value:
            raise ConfigError(f"{option} names '{key}' twice: {read[key]} and {value}. Give each a name of its own.")
        read[key] = f"{read[key]}{joined_by}{value}" if joined_by and key in read else value
    return read


def mapping_of(items: Sequence[str] | None) -> dict[str, str] | None:
    """Contrast → pattern, as --map gives them, or several; see `data.tree.alternatives`."""
    return pairs(items, "--map", "t1n='*_MPRAGE.nii.gz'", joined_by="|") or None


def part_of(text: str | None) -> "Part | None":
    """The part in '3/100'; of nothing, None.

    Raises:
        ConfigError: it is none.
    """
    from crossmr.parts import Part

    return None if text is None else Part.parse(text)


def modalities_of(items: Sequence[str] | None) -> tuple[str, ...] | None:
    """The modalities that an option names, given once as 'T1ce,FLAIR', or several times; of nothing, None.

    Raises:
        ConfigError: a name that is none, or several.
    """
    from crossmr.data.naming import modality_name, modality_names

    return tuple(modality_name(name) for name in modality_names(items)) if items else None
