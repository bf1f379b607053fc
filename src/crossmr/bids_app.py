"""crossmr-bids: the command line that BIDS-Apps share, turned into that of `crossmr complete --profile bids`."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from crossmr import cli
from crossmr.command import modalities_of
from crossmr.data.bids import ROOT
from crossmr.data.formats import is_volume
from crossmr.errors import ConfigError, CrossmrError
from crossmr.files import walk
from crossmr.paths import check_completed

VALUED = {"model": "MODEL", "planes": "N", "device": "DEVICE"}
FLAGS = ("overwrite", "register", "dry-run", "quiet", "debug", "json")
"""Options that `crossmr complete` is given as they are; its help says what they mean."""
LISTED = 10
"""Labels that an error names at most."""


def parser() -> argparse.ArgumentParser:
    """The arguments; every option with a hyphen in its name is taken with an underscore, too."""
    made = argparse.ArgumentParser(
        prog="crossmr-bids",
        description="Synthesise the missing contrasts (T1, T1ce, T2, FLAIR) of a BIDS dataset as a BIDS derivative. "
        "Research use only; not a medical device.",
        epilog="Exit codes: 0; 1 where a study failed, its verdict is refuse, or nothing could be done; 2 where the "
        "command line has an unknown option, label or contrast, or a folder that is no BIDS dataset.",
        allow_abbrev=False,
    )
    made.add_argument("bids_dir", type=Path, metavar="BIDS_DIR", help="The dataset; nothing is written into it.")
    made.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="The derivative: a folder of its own, to which jobs of other participants add.",
    )
    made.add_argument(
        "level",
        choices=("participant", "group"),
        help="participant: synthesise. group: write the report of all that lies in OUT.",
    )
    add = partial(_add, made)
    add("participant-label", nargs="+", action="extend", metavar="LABEL", help="Only these; with or without 'sub-'.")
    add("session-label", nargs="+", action="extend", metavar="LABEL", help="Only these; with or without 'ses-'.")
    add("skip-bids-validation", action="store_true", help="Accepted; crossmr itself checks what it reads, always.")
    add("targets", action="append", metavar="CONTRASTS", help="As crossmr complete --targets.")
    for option, metavar in VALUED.items():
        add(option, metavar=metavar, help=f"As crossmr complete --{option}.")
    for option in FLAGS:
        add(option, action="store_true", help=f"As crossmr complete --{option}.")
    add("version", action="version", version=f"crossmr {version('crossmr')}")
    return made


def _add(made: argparse.ArgumentParser, option: str, **settings: object) -> None:
    spellings = dict.fromkeys((f"--{option}", f"--{option.replace('-', '_')}"))
    made.add_argument(*spellings, dest=option.replace("-", "_"), **settings)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run crossmr-bids, by default with the program's own arguments."""
    usage = parser()
    given = usage.parse_args(arguments)
    try:
        _check(given.bids_dir, given.out)
        folders = chosen(given.bids_dir, given.participant_label or (), given.session_label or ())
        modalities_of(given.targets)
    except ConfigError as error:
        usage.error(str(error))
    try:
        _group(given.out) if given.level == "group" else _participants(given, folders)
    except CrossmrError as error:
        print(f"crossmr-bids: {error}", file=sys.stderr)
        sys.exit(1)


def _participants(given: argparse.Namespace, folders: Sequence[Path]) -> None:
    """Complete the studies in these folders.

    Raises:
        NamingError: a folder cannot be listed.
    """
    for folder in (empty := [folder for folder in folders if not _has_volumes(folder)]):
        print(f"{folder.relative_to(given.bids_dir)}: no image lies in it; passed over", file=sys.stderr)
    folders = [folder for folder in folders if folder not in empty] or folders  # of which crossmr says what is wrong
    passed = [part for name in VALUED if (value := getattr(given, name)) for part in (f"--{name}", value)]
    passed += [part for value in given.targets or () for part in ("--targets", value)]
    passed += [f"--{name}" for name in FLAGS if getattr(given, name.replace("-", "_"))]
    cli.main(["complete", *passed, "--profile", "bids", "--share", "--out", str(given.out), "--", *map(str, folders)])


def _check(dataset: Path, out: Path) -> None:
    """Refuse what is no BIDS dataset, and to write into one.

    Raises:
        ConfigError: BIDS_DIR lacks what makes it one, or OUT is, holds or lies in it outside its derivatives.
    """
    if not (dataset / ROOT).is_file():
        raise ConfigError(f"{dataset} is no BIDS dataset: it has no {ROOT}. 'crossmr complete' takes other folders.")
    place, whole = out.resolve(), dataset.resolve()
    inside = place.is_relative_to(whole) and whole / "derivatives" not in place.parents
    if inside or whole.is_relative_to(place):
        raise ConfigError(f"OUT {out} is BIDS_DIR, or in or around it. Name {dataset / 'derivatives' / 'crossmr'}.")


def _group(out: Path) -> None:
    """Write the report of everything that participants' jobs have left in OUT.

    Raises:
        OutputError: they have left nothing, or it cannot be written.
    """
    check_completed(out)
    from crossmr.completion.cohort import finish_cohort
    from crossmr.completion.work import find_run
    from crossmr.output.report import report_completion

    if (layout := find_run(out)) is not None:
        finish_cohort(layout)
    print(f"report: {report_completion(out)}")


def chosen(dataset: Path, participants: Sequence[str], sessions: Sequence[str]) -> list[Path]:
    """The folders of these participants and sessions; the dataset itself where all are meant.

    In BIDS a study is named by its own files, `sub-X[_ses-Y]`, so a part of a dataset has the names of the whole.

    Raises:
        ConfigError: a label that the dataset does not have.
    """
    if not participants and not sessions:
        return [dataset]
    folders = _labelled([dataset], "sub", participants)
    return _labelled(folders, "ses", sessions) if sessions else folders


def _has_volumes(folder: Path) -> bool:
    return any(is_volume(name) for _, _, names in walk(folder) for name in names)


def _labelled(places: Sequence[Path], entity: str, labels: Sequence[str]) -> list[Path]:
    """The folders ENTITY-LABEL in these, by name; of all labels where none is given."""
    there = [folder for place in places for folder in sorted(place.glob(f"{entity}-*")) if folder.is_dir()]
    names = {folder.name for folder in there}
    wanted = {f"{entity}-{label.removeprefix(f'{entity}-')}" for label in labels} or names
    if absent := sorted(wanted - names):
        known = ", ".join(sorted(names)[:LISTED]) + (" …" if len(names) > LISTED else "")
        raise ConfigError(f"{', '.join(absent)}: no such folder in {_shown(places)}; there are {known or 'none'}.")
    if not there:
        raise ConfigError(f"{_shown(places)} holds no folder {entity}-…; is it a BIDS dataset?")
    return [folder for folder in there if folder.name in wanted]


def _shown(places: Sequence[Path]) -> str:
    return str(places[0]) if len(places) == 1 else f"{len(places)} folders of {places[0].parent}"
