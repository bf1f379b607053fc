"""Who a study is of, and when it was made, from its name alone: `PAT001_2019-03-01` is PAT001 on that day.

A name is cut into words at `-`, `_`, `.` and spaces. From its end, whatever says a time point is taken away, as long as
there is something; what is left names the patient.

sure     a date; a word of a visit, with a number or without: baseline, followup, fu2, preop, post, recurrence; a
         counter with its number: visit2, Timepoint_1, week-040, 6months; BIDS' `ses-` with its label
fair     a number of up to three digits after one of five or more: BraTS-GLI-00000-001, UPENN-GBM-00001_21
weak     a letter with a number: T0, v2, m12, d3; scan1, exam2, MR1; a number of up to three digits after one of four;
         a number and days after a patient's: `BraTSReg_002_01_0262`.
         It counts only where what is left has a digit in it: `P01_T0` is of P01, but `GBM_M12` may be patient M12.
         A date after a name without any digit is weak, too, but counts: `DOE_JOHN_20190301`

So are words behind a time point that name no patient: `P01_2019-03-01_MRI`, `P01_baseline_3T`.

What follows `sub-` is BIDS' name of the patient and never a time point.

A sure time point may stand before the patient, too: `baseline_P01`, `week4_P01`, `ses-1_sub-01`. It is taken away last,
so `2019-03-01_1432` is a day and an hour, and only from what looks like a patient: letters with digits, surely; letters
alone, or four digits and more that are no hour, weakly. `BASE-01-007`, `TP53_001`, `20190301_F_33` stay as they are.
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
    "((early|late|immediate)-?)?(baseline|base|bl|initial|screening|diagnosis|follow-?up|fu|recurrence|relapse|progression|"
    "(pre|post|intra)(-?(op|operative|surgery|surgical|treatment|therapy|rt|radiotherapy))?)"
)
_COUNTER = f"visits?|time-?point|time|tp|session|sess?|{_UNIT}"
_NUMBER = r"\d+[a-z]?(-\d{1,2})?"
# What the last words of a name, joined by "-" and in lower case, may be; the longest that fits is taken.
_DATED = re.compile(rf"({_DATE})(-?t?\d{{4}}(\d\d)?)?")
_SURE = re.compile(
    rf"{_DATED.pattern}|({_VISIT})(-?{_NUMBER})?|({_COUNTER})-?({_NUMBER}|[a-z])|\d+-?({_UNIT})|sess?-[a-z0-9+]+"
)
_NUMBERED_VISIT = re.compile(rf"({_VISIT})-\d+")
_WEAK = re.compile(r"[tvmwdy]\d{1,4}|(scan|exam|study|mri?|acq)-?\d{1,3}")
LARGEST_FAMILY = 10
"""More studies than this, named alike, are taken for many patients, not for many visits of one."""
_MOST_WORDS = 5
_PART = r"(train|training|test|testing|val|validation)(set)?\d*"
_SITE = r"site|cent(er|re)|hospital|clinic|cohort|group|dataset|set|batch|scanner|part|fold"
_ANYTHING = frozenset({"mr", "mri", "brain", "head", "scan", "scans", "exam", "study", "nifti", "images", "anat"})
"""Words that name no patient: where nothing else is left, the name says a time point alone."""
_FIELD = re.compile(r"\b(\d-)?\dt\b")
_SCAN = re.compile(
    r"(series|ser|se|im|img|image|ex|exam|study|scan|mri?|acq|run|vol|volume|file|brain|head)-?\d+|([eis]-?\d+){1,2}|"
    r"\d{1,4}-(0{6}|ser(ies)?)|[a-z]*\d(-\d)?t"
)
"""What names a series, or a scanner, in a name of an archive or a converter: Series003, IM-0001, 3.000000, GE3T."""
_SEX_OR_AGE = re.compile(r"[mfw](-\d{1,3}y?|\d{1,3}y)?|\d{1,3}y")
_HOUR = re.compile(r"(0[1-9]|1\d|2[0-3])[0-5]\d([0-5]\d)?")


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
    lower = [word[0].lower() for word in words]
    count, used, dated = len(words), set[Confidence]({"sure"}), False
    while count > kept and (found := _last_time_point(lower[kept:count])) is not None:
        behind, taken, confidence = found
        start = count - behind - taken
        left = name[: words[start - 1].end()] if start else ""
        if confidence == "weak" and (not _has_digit(left) if left else behind or count < len(words)):
            break
        dated |= _is_date(words[start : count - behind])
        count = start
        used.add(confidence)
    first = 0 if kept else _leading(lower[:count])
    if first and _telling(lower[first:count]):
        surely = _looks_like_patient(lower[first:count], after_date=_begins_dated(words[:first]))
        first, used = (first, used | {surely}) if surely else (0, used)
    dated |= _begins_dated(words[:first])
    if _NUMBERED_VISIT.fullmatch("-".join(lower[:first])):  # baseline_01_P003 may be of a centre 01
        used.add("weak")
    patient = name[words[first].start() : words[count - 1].end()] if count else ""
    if count - first < len(words) and not _telling(lower[first:count]):
        patient = ""
    if dated and patient and not _has_digit(patient):
        used.add("weak")
    return PatientName(patient, max(used, key=CONFIDENCES.index))


def is_visit(name: str) -> bool:
    """Whether the name of a folder surely is a time point and nothing else: baseline, 2019-03-01, ses-1."""
    return bool(name) and parse_patient(name) == PatientName("", "sure")


def is_dated(name: str) -> bool:
    """Whether a name is a date."""
    return _is_date([*_WORD.finditer(name)])


def look_alike(name: str) -> str:
    """How names of the patient's other studies may begin, where the end of this one could be a time point; or ''.

    That is all but the last word, if `parse_patient` does not take that one for a time point, and what stands before it
    has a digit, or it is a letter with a number; or all but a single letter after a number: P01a.
    """
    words = list(_WORD.finditer(name))
    if parse_patient(name).patient != name:
        return ""
    if re.fullmatch(r"[a-z]*\d+[a-z]", words[-1][0].lower()):
        return name[:-1]
    if len(words) < (3 if name.lower().startswith("sub-") else 2):
        return ""
    last, left = words[-1][0].lower(), name[: words[-2].end()]
    short = re.fullmatch(r"[a-z]*\d{0,3}|(19|20)\d\d", last) is not None
    return left if (short and _has_digit(left)) or _WEAK.fullmatch(last) else ""


def after_first(name: str) -> tuple[str, str]:
    """The first word of a name, and what follows it; the first is '' where there is but one, or it is `sub`."""
    words = list(_WORD.finditer(name))
    if len(words) < 2 or words[0][0].lower() == "sub":
        return "", name
    return words[0][0], name[words[1].start() :]


def after_time_point(name: str) -> str:
    """What follows the time points with which a name begins; '' where it begins with none."""
    words = list(_WORD.finditer(name))
    first = 0 if name.lower().startswith("sub-") else _leading([word[0].lower() for word in words])
    return name[words[first].start() :] if first else ""


def looks_like_patient(name: str, *, after_date: bool) -> Confidence | None:
    """How surely what follows a time point, or lies in its folder, is a patient; None of a number, an hour, an age."""
    return _looks_like_patient([word[0].lower() for word in _WORD.finditer(name)], after_date=after_date)


def says_nothing(name: str) -> bool:
    """Whether a name has only words that name no patient: Brain_3T."""
    return not _telling([word[0].lower() for word in _WORD.finditer(name)])


def names_scan(name: str) -> bool:
    """Whether a name may say no more than which series it is, or of which scanner: IM-0001, S003, 3.000000, MRI_3T."""
    said = _telling([word[0].lower() for word in _WORD.finditer(name)])
    return not said or _SCAN.fullmatch(said) is not None


def names_part(name: str) -> bool:
    """Whether a name is that of a part of a cohort: train, validation_set."""
    return re.fullmatch(_PART, "".join(word[0].lower() for word in _WORD.finditer(name))) is not None


def may_repeat(first: str, rest: str) -> bool | None:
    """Whether `first` may be a time point or a site of the patient `rest`: V1 of P01, 2019 of P01, siteA of P01.

    None where it has a number, so that it may be the patient, too; False where `rest` names nobody.
    """
    words = [word[0].lower() for word in _WORD.finditer(first)]
    visit = _WEAK.fullmatch("-".join(words)) is not None or re.fullmatch(r"(19|20)\d\d", first) is not None
    place = re.fullmatch(rf"({_SITE})\d*", "".join(words)) is not None
    part = names_part(first)
    known, bare = visit or part, re.fullmatch(r"\d{1,3}", rest) is not None
    if bare and (not known or (part and _has_digit(first))):  # training01_01 is of training01
        return False
    if not _has_digit(rest) or not parse_patient(rest).patient:
        return False
    return True if known or place or not _has_digit(first) else None


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
    if len(words) > 2 and re.fullmatch(r"\d{3,}-0\d-\d{4}", "-".join(words[-3:])):  # BraTSReg_002_01_0262
        return 2, "weak"
    if len(words) > 1 and re.fullmatch(r"\d{1,3}", words[-1]) and re.fullmatch(r"\d{4,}", words[-2]):
        if len(words[-2]) > 4:
            return 1, "fair"
        if not re.fullmatch(r"(19|20)\d\d", words[-2]):
            return 1, "weak"
    return None


def _last_time_point(words: Sequence[str]) -> tuple[int, int, Confidence] | None:
    """As `_time_point`, after how many words behind it that name no patient: baseline_MRI, 2019-03-01_3T."""
    for behind in range(len(words)):
        if behind and _telling(words[len(words) - behind :]):
            break
        if found := _time_point(words[: len(words) - behind]):
            return None if behind and words[len(words) - behind - 1] in ("t1", "t2") else (behind, *found)
    return None


def _leading(words: Sequence[str]) -> int:
    """How many of the first words surely are time points of the patient whom the others name; 0 where none is left.

    With those beside them that name no patient: MRI_preop_P01, 2019-03-01_3T_P01.
    """
    first = 0
    while first < len(words) - 1:
        nothing = _telling_nothing(words[first:-1])
        taken = next(
            (
                before + n
                for before in range(nothing + 1)
                for n in range(min(_MOST_WORDS, len(words) - first - before - 1), 0, -1)
                if _is_leading(words[first + before :], n)
            ),
            0,
        )
        if not taken:
            fields = (n for n in (2, 1) if first and first + n < len(words) and _is_field(words[first : first + n]))
            return first + next(fields, 0)
        first += taken
    return first


def _telling_nothing(words: Sequence[str]) -> int:
    """How many of the first words name no patient."""
    return next((count for count in range(len(words), 0, -1) if not _telling(words[:count])), 0)


def _is_leading(words: Sequence[str], taken: int) -> bool:
    """Whether the first words are a time point; post alone may be of a contrast agent, unless a number follows."""
    said = "-".join(words[:taken])
    return _SURE.fullmatch(said) is not None and (said not in ("pre", "post") or _has_digit("".join(words[taken:])))


def _telling(words: Sequence[str]) -> str:
    """The words that may name a patient, joined by "-": no strength of the field, no brain."""
    return _FIELD.sub("", "-".join(word for word in words if word not in _ANYTHING)).strip("-")


def _looks_like_patient(words: Sequence[str], *, after_date: bool) -> Confidence | None:
    said = _telling(words)
    if not said or _SEX_OR_AGE.fullmatch(said):
        return None
    if any(letter.isalpha() for letter in said):
        if _has_digit(said):
            return "weak" if _SCAN.fullmatch(said) else "sure"
        return "weak" if len(said) > 1 else None
    if "-" in said or re.fullmatch(r"\d{1,3}|(19|20)\d\d", said) or (after_date and _HOUR.fullmatch(said)):
        return None
    return "weak"


def _is_date(words: Sequence[re.Match[str]]) -> bool:
    return _DATED.fullmatch("-".join(word[0].lower() for word in words)) is not None


def _is_field(words: Sequence[str]) -> bool:
    return _FIELD.fullmatch("-".join(words)) is not None


def _begins_dated(words: Sequence[re.Match[str]]) -> bool:
    """Whether a date is among the first words."""
    return any(_is_date(words[first:end]) for end in range(len(words) + 1) for first in range(end))


def _has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)
