"""Who a study is of, and when it was made, from its name alone: `PAT001_2019-03-01` is PAT001 on that day.

A name is cut into words at `-`, `_`, `.` and spaces. From its end, whatever says a time point is taken away, as long as
there is something; what is left names the patient.

sure     a date; a word of a visit, with a number or without: baseline, followup, fu2, preop, post, recurrence; a
         counter with its number: visit2, Timepoint_1, week-040, 6months; BIDS' `ses-` with its label
fair     a number of up to three digits after one of five or more: BraTS-GLI-00000-001, UPENN-GBM-00001_21
weak     a letter with a number: T0, v2, m12, d3; scan1, exam2, MR1; a number of up to three digits after one of four.
         It counts only where what is left has a digit in it: `P01_T0` is of P01, but `GBM_M12` may be patient M12.
         A date after a name without any digit is weak, too, but counts: `DOE_JOHN_20190301`

What follows `sub-` is BIDS' name of the patient and never a time point.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Confidence = Literal["sure", "fair", "weak"]
CONFIDENCES: tuple[Confidence, ...] = ("sure", "fair", "weak")

_WORD = re.compile(r"[^-_. ]+")
_DATE = r"(19|20)\d\d-?(0[1-9]|1[0-2])-?(0[1-9]|[12]\d|3[01])|(0[1-9]|[12]\d|3[01])-(0[1-9]|[12]\d|3[01])-(19|20)\d\d"
_UNIT = "days?|weeks?|wks?|months?|mo|years?|yrs?"
_VISIT = (
    "baseline|base|bl|initial|screening|(early|late)?-?follow-?up|fu|recurrence|relapse|progression|"
    "(pre|post|intra)(-?(op|operative|surgery|surgical|treatment|therapy|rt|radiotherapy))?"
)
_COUNTER = f"visits?|time-?point|time|tp|session|ses|{_UNIT}"
_NUMBER = r"\d+[a-z]?(-\d{1,2})?"
# What the last words of a name, joined by "-" and in lower case, may be; the longest that fits is taken.
_DATED = re.compile(rf"({_DATE})(-?t?\d{{4}}(\d\d)?)?")
_SURE = re.compile(
    rf"{_DATED.pattern}|({_VISIT})(-?{_NUMBER})?|({_COUNTER})-?({_NUMBER}|[a-z])|\d+-?({_UNIT})|ses-[a-z0-9+]+"
)
_WEAK = re.compile(r"[tvmwdy]\d{1,4}|(scan|exam|study|mri?|acq)-?\d{1,3}")
_MOST_WORDS = 5
_ANYTHING = frozenset({"mr", "mri", "brain", "head", "scan", "scans", "exam", "study", "nifti", "images", "anat"})
"""Words that name no patient: where nothing else is left, the name says a time point alone."""


@dataclass(frozen=True)
class PatientName:
    """What a name says."""

    patient: str
    """The name without its time points; empty where it is of nothing else."""
    confidence: Confidence
    """Of the weakest rule that took something away."""


@lru_cache(maxsize=100_000)
def parse_patient(name: str) -> PatientName:
    """The patient in the name of a study, or of a folder."""
    words = list(_WORD.finditer(name))
    kept = 2 if name.lower().startswith("sub-") else 0
    count, used, dated = len(words), set[Confidence]({"sure"}), False
    while count > kept and (found := _time_point([word[0].lower() for word in words[kept:count]])) is not None:
        taken, confidence = found
        left = name[: words[count - taken - 1].end()] if count > taken else ""
        if confidence == "weak" and (not _has_digit(left) if left else count < len(words)):
            break
        dated |= _DATED.fullmatch("-".join(word[0].lower() for word in words[count - taken : count])) is not None
        count -= taken
        used.add(confidence)
    patient = name[: words[count - 1].end()] if count else ""
    if count < len(words) and all(word[0].lower() in _ANYTHING for word in words[:count]):
        patient = ""
    if dated and patient and not _has_digit(patient):
        used.add("weak")
    return PatientName(patient, max(used, key=CONFIDENCES.index))


def look_alike(name: str) -> str:
    """All but the last word of a name, if that word could be a time point which `read` does not take for one; or ''.

    It could where what stands before it has a digit, or where it is a letter with a number.
    """
    words = list(_WORD.finditer(name))
    if len(words) < (3 if name.lower().startswith("sub-") else 2) or parse_patient(name).patient != name:
        return ""
    last, left = words[-1][0].lower(), name[: words[-2].end()]
    short = re.fullmatch(r"[a-z]*\d{0,3}|(19|20)\d\d", last) is not None
    return left if (short and _has_digit(left)) or _WEAK.fullmatch(last) else ""


def trailing_visit(words: Sequence[str]) -> int:
    """How many of the last words surely are a time point; `pre` and `post` alone may be of a contrast agent."""
    found = _time_point([word.lower() for word in words]) if words else None
    if found is None or found[1] != "sure" or words[-1].lower() in ("pre", "post"):
        return 0
    return found[0]


def _time_point(words: Sequence[str]) -> tuple[int, Confidence] | None:
    """How many of the last words are a time point, and how surely; None where they are none."""
    rules: dict[Confidence, re.Pattern[str]] = {"sure": _SURE, "weak": _WEAK}
    for confidence, rule in rules.items():
        for taken in range(min(_MOST_WORDS, len(words)), 0, -1):
            if rule.fullmatch("-".join(words[-taken:])):
                return taken, confidence
    if len(words) > 1 and re.fullmatch(r"\d{1,3}", words[-1]) and re.fullmatch(r"\d{4,}", words[-2]):
        if len(words[-2]) > 4:
            return 1, "fair"
        if not re.fullmatch(r"(19|20)\d\d", words[-2]):
            return 1, "weak"
    return None


def _has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)
