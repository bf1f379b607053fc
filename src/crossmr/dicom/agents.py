"""Which T1 series of a study were acquired with contrast agent, where no tag tells: their voxels are compared."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from crossmr.data.contrast_agent import said_of_agent
from crossmr.data.enhancement import MAX_COMPARED, SURENESS, THRESHOLD, compare
from crossmr.data.volume import Volume
from crossmr.dicom.series import Series
from crossmr.errors import CrossmrError

COUNTERPART = {"t1n": "t1c", "t1c": "t1n"}
UNLIKE = 1.0
"""Score from which on series of unlike sequences are told apart: blood that flows in is bright in some, agent or no."""


def undecided(all_series: Sequence[Series]) -> list[Series]:
    """The T1 series of a study where all of several are taken for T1, or all for T1ce, and some may be the other."""
    for modality, other in COUNTERPART.items():
        alike = [series for series in all_series if series.modality == modality]
        if several_acquisitions(alike, all_series) and not any(series.modality == other for series in all_series):
            return alike if any(may_be_other(series) for series in alike) else []
    return []


def several_acquisitions(alike: Sequence[Series], all_series: Sequence[Series]) -> bool:
    """Whether series of one contrast were not all acquired at once: what a scanner makes of one acquisition is alike.

    Its reformats, filtered images and water and fat share a time and their timing, and other contrasts have other
    times: where there are none, the time may be made up.
    """
    others = {s.time for s in all_series if s.modality and all(s.modality != one.modality for one in alike)}

    def acquisition(number: int, series: Series) -> object:
        timing = series.acquisition
        is_real = series.time and any(others) and series.time not in others
        return (series.time, timing.tr_ms, timing.te_ms, timing.ti_ms) if is_real else number

    return len({acquisition(number, series) for number, series in enumerate(alike)}) > 1


def are_first(alike: Sequence[Series], all_series: Sequence[Series]) -> bool:
    """Whether these were acquired before all other contrasts, as T1 without agent usually are."""
    others = [series.time for series in all_series if series.modality and series.modality != alike[0].modality]
    return bool(others) and all(series.time for series in alike) and max(s.time for s in alike) < min(others)


def may_be_other(series: Series) -> bool:
    """Whether neither the tag nor the description of a T1, nor the user, settles whether it is enhanced."""
    tag, said = series.acquisition.agent, said_of_agent(series.acquisition.description)
    if series.mapped or said.contradicts(tag):
        return not series.mapped
    return said.agent is None and (series.modality == "t1c" or tag is not False)


def plain_by_order(series: Series) -> bool:
    """Whether a series is a T1 as it was acquired first alone: an agent is named on every series of its study."""
    return series.modality == "t1n" and series.acquisition.before == "order" and not series.mapped


def tell_apart(all_series: Sequence[Series], read: Callable[[Series], Volume]) -> list[Series]:
    """The series of a study, its T1 told apart by their voxels where nothing else tells.

    Each is compared with each. One that is surely enhanced beside another, and beside none surely not, is T1ce, and the
    other way round T1; what is left then is used for neither. Where nothing is sure, none changes but in `compared`.
    A T1 by order alone that is surely enhanced beside a T1ce is T1ce, as its tag says.
    """
    if ordered := [series for series in all_series if plain_by_order(series)]:
        return _confirmed(ordered, all_series, read)
    alike = undecided(all_series)[:MAX_COMPARED]
    beside = _compared(alike, read)
    if not beside:
        return list(all_series)
    verdicts = {series: next(iter(found)) for series, found in beside.items() if len(found) == 1}
    against = any(verdicts.get(s, s.modality) != s.modality and not may_be_other(s) for s in alike)
    if against or set(verdicts.values()) != set(COUNTERPART):
        return [replace(series, compared=True) if series in alike else series for series in all_series]
    return [_told(s, verdicts.get(s), beside[s]) if s in beside else s for s in all_series]


def in_question(all_series: Sequence[Series]) -> bool:
    """Whether `tell_apart` reads any of these series."""
    return bool(undecided(all_series)) or any(plain_by_order(series) for series in all_series)


def _confirmed(
    ordered: Sequence[Series], all_series: Sequence[Series], read: Callable[[Series], Volume]
) -> list[Series]:
    """The series of a study, its T1 by order alone compared with its T1ce."""
    enhanced = [series for series in all_series if series.modality == "t1c"]
    beside = _compared([*ordered, *enhanced][:MAX_COMPARED], read)
    told = {}
    for series in ordered:
        found = beside.get(series, {})
        told[series] = replace(series, compared=bool(beside))
        if len(found) == 1:
            told[series] = _told(series, next(iter(found)), found)
    return [told.get(series, series) for series in all_series]


def _compared(alike: Sequence[Series], read: Callable[[Series], Volume]) -> dict[Series, dict[str, Series]]:
    """Series → what it surely is, "t1n" or "t1c", beside which other; {} where fewer than two can be read."""
    volumes: dict[Series, Volume] = {}
    for series in alike:
        try:
            volumes[series] = read(series)
        except CrossmrError:  # which is said when the series is converted
            continue
    beside: dict[Series, dict[str, Series]] = {series: {} for series in alike} if len(volumes) > 1 else {}
    for first, second in itertools.combinations(volumes, 2):
        limit = THRESHOLD if _sequence(first) == _sequence(second) else UNLIKE
        if (enhanced := compare(volumes[first], volumes[second]).at(limit)) != "neither":
            bright, plain = (first, second) if enhanced == "first" else (second, first)
            beside[bright].setdefault("t1c", plain)
            beside[plain].setdefault("t1n", bright)
    return beside


def _told(series: Series, modality: str | None, beside: Mapping[str, Series]) -> Series:
    """A series that its voxels told to be T1 or T1ce, or not."""
    if modality is None and not may_be_other(series):
        return series
    if modality is None:
        return replace(series, modality=None, compared=True, why="a T1, with contrast agent or without: nothing tells")
    relation = "brighter" if modality == "t1c" else "darker"
    told = f"vessels {relation} than in {beside[modality].name}, {SURENESS}"
    timing = series.why.split(";")[0]
    return replace(series, modality=modality, compared=True, told=told, why=f"{timing}; {told}")


def _sequence(series: Series) -> tuple[frozenset[str], bool]:
    """The kind of sequence: spin or gradient echo, and whether it is inverted."""
    acquisition = series.acquisition
    inverted = bool(acquisition.ti_ms) or "IR" in acquisition.families or "MP" in acquisition.variants
    return acquisition.families & {"SE", "GR"}, inverted
