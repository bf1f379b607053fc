"""Which of a study's series is taken for each contrast, and why the others are not."""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from crossmr.data.contrast_agent import said_of_agent, says_agent
from crossmr.data.naming import display_name, in_usual_order
from crossmr.dicom.agents import plain_by_order, several_acquisitions
from crossmr.dicom.contrast import covers, names
from crossmr.dicom.series import Series

ALIKE = 1.2
"""Two series whose voxels differ by less than this factor count as equally fine, and the later one is taken."""
MUCH = 2.0
"""Slices that are thinner by more than this factor count more than the plane that most of the study shares."""
HEAD_MM = 140.0
"""What a series covers beyond this length, along any axis, counts for nothing."""
COVERS, PARTLY = 0.8, 0.65
"""A series that covers less than the first fraction of what another does is not taken before it; one that covers less
than the second fraction of what another contrast does may lack a part."""

ORDINARY = frozenset(
    (
        "MPR",
        "REFORMATTED",
        "RESAMPLED",
        "WATER",
        "W",
        "IN_PHASE",
        "IP",
        "UNI",
        "NORM",
        "DIS2D",
        "DIS3D",
        "FIL",
        "MFSPLIT",
    )
)
"""Values of Image Type that say how a contrast was reformatted, corrected or separated: it is still that contrast."""


def taken(all_series: Sequence[Series]) -> list[str]:
    """The modalities that a conversion of a study has."""
    return list(choose(all_series)[0])


def choose(all_series: Sequence[Series]) -> tuple[dict[str, Series], dict[str, str], list[str]]:
    """Modality → its series, name of each other series → why it was left out, and notes for a reader."""
    chosen: dict[str, Series] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for series in all_series:
        if series.modality is None:
            left_out[_unique_name(series, left_out)] = series.why
    common = _common_planes(all_series)
    for modality in in_usual_order(known := {s.modality for s in all_series if s.modality}):
        candidates = [s for s in all_series if s.modality == modality]
        # Of several T1, none of which is known to be enhanced, one may be: the agent is given last.
        unsure = modality == "t1n" and several_acquisitions(candidates, all_series) and "t1c" not in known
        best = candidates[0]
        for candidate in candidates[1:]:
            if _preferred(candidate, best, common, earlier=unsure):
                best = candidate
        chosen[modality] = best
        for candidate in candidates:
            if candidate is not best:
                why = f"another {modality}, {_difference(candidate, best, common)} {best.name}"
                left_out[_unique_name(candidate, left_out)] = why
        if unsure:
            listed = ", ".join(s.name for s in candidates)
            notes.append(
                f"{listed} are T1, and no tag says which was acquired with contrast agent; {best.name} was taken for "
                "the one without. Name it with --map t1c='DESCRIPTION' if that is wrong."
            )
    if "t1c" in chosen and chosen["t1c"].told:
        taken_for, told = chosen["t1c"].name, chosen["t1c"].told
        notes.append(f"{taken_for} was taken for T1ce: {told}. Name it with --map if that is wrong.")
    notes += filter(None, (_agent_everywhere(all_series, chosen), _enhanced_by_description(all_series, chosen)))
    notes += filter(None, (_doubt(modality, series, all_series) for modality, series in chosen.items()))
    notes += dict.fromkeys(note for series in chosen.values() for note in series.notes)
    largest = max(chosen.values(), key=_covered, default=None)
    notes += [
        f"{series.name} ({modality}) covers {_covered(series) / _covered(largest):.0%} of what {largest.name} does: "
        "a part of it may be missing. Export the whole series."
        for modality, series in chosen.items()
        if largest and _covered(series) < PARTLY * _covered(largest)
    ]
    return chosen, left_out, notes


def _agent_everywhere(all_series: Sequence[Series], chosen: Mapping[str, Series]) -> str:
    """A note where every series names the agent and nothing tells which T1 was acquired without it; else ''."""
    known = [series for series in all_series if series.modality]
    if len(known) < 2 or "t1c" not in chosen or "t1n" in chosen or not all(s.acquisition.agent for s in known):
        return ""
    if chosen["t1c"].mapped or says_agent(chosen["t1c"].acquisition.description):
        return ""
    return (
        "every series names a contrast agent, which may have been typed in for the whole examination; "
        f"{chosen['t1c'].name} was taken for T1ce. Name it with --map t1n='DESCRIPTION' if that is wrong."
    )


def _doubt(modality: str, series: Series, all_series: Sequence[Series]) -> str:
    """A note on a series that was taken for a contrast although something speaks against it; '' where nothing does."""
    acquisition, shown = series.acquisition, display_name(modality)
    if series.mapped:
        return ""
    said = said_of_agent(acquisition.description)
    if plain_by_order(series) and not series.told:
        tell = ", and its volume does not tell" if series.compared else ""
        return (
            f"every series names a contrast agent; {series.name} was taken for T1 as it was acquired first{tell}. "
            "Name it with --map t1c='DESCRIPTION' if that is wrong."
        )
    if modality in ("t1n", "t1c") and said.contradicts(acquisition.agent) and not series.told:
        given, denied = ("names", "denies") if acquisition.agent else ("denies", "names")
        return (
            f"{series.name} was taken for {shown}: its tag {given} a contrast agent, which its description {denied}. "
            "Name it with --map if that is wrong."
        )
    if not (series.original or acquisition.kinds & ORDINARY or names(acquisition.description, modality)):
        kinds = ", ".join(sorted(acquisition.kinds - {""}))
        return (
            f"{series.name} was taken for {shown}: it is derived from other images (image type {kinds}), and its "
            "description does not name that contrast. Name it with --map if that is right, or another one."
        )
    alike = [other for other in all_series if other.modality == modality]
    if modality == "t2f" and any(_without_agent(other) > _without_agent(series) for other in alike):
        return (
            f"{series.name} was taken for {shown}, and names a contrast agent; another {shown} that names none was "
            f"left out. Name it with --map {modality}='DESCRIPTION' if that is wrong."
        )
    return ""


def _enhanced_by_description(all_series: Sequence[Series], chosen: Mapping[str, Series]) -> str:
    """A note where several T1ce of different times are there and no T1, and the description alone says so of one."""
    enhanced = [series for series in all_series if series.modality == "t1c"]
    by_words = [s.name for s in enhanced if s.acquisition.agent is None and not (s.mapped or s.told)]
    if "t1n" in chosen or not by_words or not several_acquisitions(enhanced, all_series):
        return ""
    return (
        f"{', '.join(s.name for s in enhanced)} are T1ce of different times, {' and '.join(by_words)} by description "
        "alone; there is no T1. If one was acquired without contrast agent, name it with --map t1n='DESCRIPTION'."
    )


def _preferred(series: Series, other: Series, common: Collection[int], *, earlier: bool) -> bool:
    """Whether to take `series`: the first of `_ranks` in which they differ decides.

    `common` holds the axes along which most series of the study are sliced. Then the later counts, or, if asked, the
    earlier. Where the earlier is wanted, one whose tags say that no agent was given comes before both.
    """
    for _, ours, others in _ranks(series, other, common):
        if ours != others:
            return ours > others
    if not earlier:
        return series.time >= other.time
    plain, other_plain = series.acquisition.agent is False, other.acquisition.agent is False
    return plain if plain != other_plain else series.time < other.time


def _ranks(series: Series, other: Series, common: Collection[int]) -> Iterator[tuple[str, int, int]]:
    """In what an inferior series differs, and how both rank in it; the most important first."""
    yield "of a part of the head, unlike", _shows(series), _shows(other)
    yield "covers less than", not _covers_less(series, other), not _covers_less(other, series)
    yield "derived, unlike", series.original, other.original
    yield "coarser than", not _coarser(series, other, MUCH), not _coarser(other, series, MUCH)
    yield "in another plane than", _plane(series) in common, _plane(other) in common
    yield "coarser than", not _coarser(series, other), not _coarser(other, series)
    if series.modality not in ("t1n", "t1c"):
        yield "after the contrast agent, unlike", _without_agent(series), _without_agent(other)


def _without_agent(series: Series) -> int:
    """How much speaks for a T2 or FLAIR without contrast agent: its description counts more than its tag."""
    said = says_agent(series.acquisition.description)
    return -2 * (said is True) - (series.acquisition.agent is True and said is not False)


def _shows(series: Series) -> int:
    return covers(series.acquisition.part, series.acquisition.description)


def _covers_less(series: Series, other: Series) -> bool:
    """Whether its box holds less of a head than another's."""
    return _covered(series) < COVERS * _covered(other)


def _covered(series: Series) -> float:
    """How much of a head its box holds, mm³."""
    return math.prod(min(side, HEAD_MM) for side in series.extent_mm)


def _plane(series: Series) -> int:
    """The axis along which it is sliced: 0 sagittal, 1 coronal, 2 axial."""
    return int(np.abs(np.cross(*series.orientation)).argmax())


def _common_planes(all_series: Sequence[Series]) -> set[int]:
    """The axes along which most series of known contrast are sliced."""
    counts = Counter(_plane(series) for series in all_series if series.modality)
    return {plane for plane, count in counts.items() if count == max(counts.values())}


def _difference(series: Series, best: Series, common: Collection[int]) -> str:
    """In what a series is inferior to the one that was chosen."""
    for inferior, ours, others in _ranks(series, best, common):
        if ours < others:
            return inferior
    if series.time == best.time:
        return "of the same time as"
    return "earlier than" if series.time < best.time else "later than"


def _unique_name(series: Series, names: Collection[str]) -> str:
    """The series' name, numbered where there is one of this name already."""
    numbered = (series.name if k == 1 else f"{series.name} ({k})" for k in itertools.count(1))
    return next(name for name in numbered if name not in names)


def _coarser(a: Series, b: Series, factor: float = ALIKE) -> bool:
    """Whether a's voxels are longer than b's by more than a factor, or, where they are about as long, larger."""
    longest = max(a.voxel_mm), max(b.voxel_mm)
    if max(longest) > factor * min(longest):
        return longest[0] > longest[1]
    return factor == ALIKE and math.prod(a.voxel_mm) > factor * math.prod(b.voxel_mm)
