"""Which series of DICOM is taken for which contrast, for a person to see and to choose: as a table, and in a few lines.

dicom/series_table.py reads and writes the table; here is what is doubtful in it, and what it changes of the inputs.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crossmr.completion.inputs import Inputs, PlannedCase, lacking
from crossmr.completion.unread import unread_series
from crossmr.data.naming import display_name, in_usual_order
from crossmr.dicom.selection import choose
from crossmr.dicom.series import Series
from crossmr.dicom.series_table import (
    BY_PERSON,
    NOT_USED,
    SeriesTable,
    about,
    decide,
    keys_of,
    without_remedy,
    write_series_table,
)
from crossmr.display import Display
from crossmr.errors import ConfigError
from crossmr.networks.model import CrossConditionedModel

BY_DESCRIPTION = "its description"
"""How `recognise_contrast` begins to say that no tag tells a contrast."""
DESCRIPTIONS, NOT_TAKEN = 8, 20
"""So many descriptions of each contrast are named, and of what is not used."""


def as_chosen(inputs: Inputs, table: SeriesTable, display: Display, *, whole: bool = True) -> Inputs:
    """The inputs with the series that a person's table says; what it does not fit is said. `whole` as in `about`.

    Raises:
        ConfigError: they are no DICOM; or as `decide`.
    """
    cases = _dicom(inputs, table.path)
    for line in about(table, cases, whole=whole):
        display.say(line)
    decided = {case: decide(all_series, table) for case, all_series in cases.items()}
    listed = {case for case, all_series in cases.items() if any(key[0] in table.studies for key in keys_of(all_series))}
    chosen = [case for case, of_case in decided.items() for one in of_case if one.why in (BY_PERSON, NOT_USED)]
    where = f"in {len({*chosen})} of {_studies(len(listed))}"
    display.say(f"{table.path.name}: a person has chosen {len(chosen)} series, {where}")
    return replace(inputs, series=decided, listed=frozenset(listed))


def _dicom(inputs: Inputs, path: Path) -> Mapping[str, Sequence[Series]]:
    if inputs.series is None:
        raise ConfigError(f"--series-table {path} is for DICOM, and these are files of NIfTI; use --map for them.")
    return inputs.series


def write_choice(
    path: Path, inputs: Inputs, model: CrossConditionedModel, extra: Collection[str], display: Display
) -> None:
    """Write the table of all series, doubtful studies first, or add to one that is there what it lacks.

    `extra` are the modalities of a user's own.

    Raises:
        ConfigError: the inputs are no DICOM, or what is there is no such table. OutputError: it cannot be written.
    """
    cases = _dicom(inputs, path)
    doubts: dict[Series, str] = {}
    ranks: dict[str, int] = {}
    for case, all_series in cases.items():
        grave, slight = _doubts(all_series, model)
        ranks[case] = 0 if grave else 1 if slight else 2
        doubts |= {one: "; ".join([*grave.get(one, ()), *slight.get(one, ())]) for one in {*grave, *slight}}
    order = sorted(cases, key=lambda case: (ranks[case], case))
    added, there = write_series_table(path, {case: cases[case] for case in order}, doubts, extra)
    count = sum(rank == 0 for rank in ranks.values())
    told = f"{added} series added, {_studies(count)}" if there else f"{added} series of {_studies(len(cases))}, {count}"
    display.say(
        f"{path}: {told} in doubt. Correct the column contrast, and give the table to the same command without "
        "--dry-run. NOT FOR SHARING: it holds descriptions, dates and UIDs."
    )


def _doubts(
    all_series: Sequence[Series], model: CrossConditionedModel
) -> tuple[dict[Series, list[str]], dict[Series, list[str]]]:
    """Series of a study → what is doubtful of it; what may be wrong, and what is but a choice among several."""
    chosen, _, notes = choose(all_series)
    grave: dict[Series, list[str]] = defaultdict(list)
    slight: dict[Series, list[str]] = defaultdict(list)
    missing = lacking([*chosen], model)
    for series in chosen.values():
        if series.why.startswith(BY_DESCRIPTION):
            grave[series].append("no tag tells it, its description alone does")
    for note in notes:
        about_it = [one for one in all_series if re.search(rf"{re.escape(one.name)}(?!\d)", note)]
        for series in [one for one in about_it if one in chosen.values()] or about_it or chosen.values():
            grave[series].append(without_remedy(note))
    for unread in unread_series(all_series):
        if may_be := [display_name(m) for m in missing if m in unread.may_be]:
            for series in (one for one in all_series if one.name == unread.name and one not in chosen.values()):
                grave[series].append(
                    f"may be {' or '.join(may_be)}, which is missing, and {without_remedy(unread.why)}"
                )
    for modality, series in chosen.items():
        others = [one.name for one in all_series if one.modality == modality and one is not series]
        if others and not series.mapped:
            slight[series].append(f"{', '.join(others)} could be {modality}, too")
    return grave, slight


def by_description(planned: Sequence[PlannedCase]) -> list[str]:
    """Each contrast, and how the series are described that are taken for it, the most frequent first; not for sharing.

    Nothing where the studies are no DICOM.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case in planned:
        for modality, descriptions in case.described.items():
            counts[modality].update({*descriptions})
    studies = sum(bool(case.described) for case in planned)
    lines = []
    for modality in in_usual_order({*counts} - {""}):
        without = studies - sum(modality in case.described for case in planned if case.described)
        none = f"; none in {_studies(without)}" if without else ""
        lines.append(f"{modality} ← {_most_frequent(counts[modality], DESCRIPTIONS)}{none}")
    return [*lines, f"not used: {_most_frequent(counts[''], NOT_TAKEN)}"] if counts[""] else lines


def _most_frequent(counts: Counter[str], most: int) -> str:
    """Descriptions, and in how many studies each is."""
    order = sorted(counts, key=lambda text: (-counts[text], text))
    told = [f"{repr(text) if text else 'no description'} in {counts[text]}" for text in order[:most]]
    told[0] += " studies" if counts[order[0]] > 1 else " study"
    more = f", and {len(order) - most} other descriptions" if len(order) > most else ""
    return f"{', '.join(told)}{more}"


def _studies(count: int) -> str:
    return f"{count} {'study' if count == 1 else 'studies'}"
