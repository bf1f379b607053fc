"""Which file is which: studies and their modalities, from file names alone.

No file is opened here, and no channel order is ever assumed. `recognise` reads names; `find_studies` walks a folder and
calls it. A study whose files are ambiguous is still listed: its error comes from `StudyFiles.images()` or `.label()`,
so that one patient never stops a cohort.
"""

import difflib
import fnmatch
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crossmr.data.visits import CONFIDENCES, Confidence, look_alike, read
from crossmr.errors import ConfigError, NamingError
from crossmr.files import walk
from crossmr.paths import check_studies

MODALITIES = ("t1n", "t1c", "t2w", "t2f", "pdw")
"""Canonical names of the modalities that file names are searched for."""
DISPLAY_NAMES = {"t1n": "T1", "t1c": "T1ce", "t2w": "T2", "t2f": "FLAIR", "pdw": "PD"}
"""Names of the modalities for people to read."""

_LABEL, _OTHER = "label", ""

# What the last words of a file name mean, in lower case, with "-" for any separator between words.
_WORDS = {
    "t1n": "t1n t1 t1w t1pre t1-pre",
    "t1c": "t1c t1ce t1gd t1post t1wce t1wgd t1-c t1-ce t1-gd t1-post t1w-ce t1w-gd t1w-post",
    "t2w": "t2w t2",
    "t2f": "t2f flair t2flair t2-flair t2w-flair",
    "pdw": "pdw pd",
    _LABEL: "seg segm segmentation dseg label labels lesion lesions mask roi tumor tumour "
    "tumor-seg tumor-mask tumor-segmentation lesion-seg lesion-mask automated-approx-segm",
    # A brain mask is not a segmentation of a disease, although its name ends as one.
    _OTHER: "brain-mask brainmask brain-seg brain-segmentation",
}
_MEANING = {word: meaning for meaning, words in _WORDS.items() for word in words.split()}
_LONGEST = max(word.count("-") for word in _MEANING) + 1

_SEPARATORS = "-_. "
_WORD = re.compile(r"[^-_. ]+")
_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_BIDS_CASE = re.compile(r"sub-[A-Za-z0-9+]+(_ses-[A-Za-z0-9+]+)?(?=_|$)")
_BIDS_FILE = re.compile(_BIDS_CASE.pattern + r"(?P<entities>(_[A-Za-z]+-[A-Za-z0-9+.]+)*)_(?P<suffix>[A-Za-z0-9]+)")
BIDS_ROOT = "dataset_description.json"
_BIDS_EXCLUDED = frozenset({"derivatives", "sourcedata", "code", "stimuli"})
"""Folders of a BIDS dataset that hold no scans of its own."""
# Folders named after the kind of their files, not after a patient, such as BIDS' anat/.
_ANONYMOUS = frozenset({"anat", "nifti", "nii", "mri", "images"})


@dataclass(frozen=True)
class StudyFiles:
    """The files of one study, none of them opened yet."""

    case: str
    """Unique name of the study, fit for a file name: `BraTS-GLI-00000-000`, `sub-01_ses-02`."""
    patient: str
    """The patient: `BraTS-GLI-00000`, `sub-01`; the same as `case` where the name says no more. A split is by it."""
    candidates: Mapping[str, tuple[Path, ...]]
    """Modality → the files whose names say it; in the order of `MODALITIES`, custom ones after."""
    labels: tuple[Path, ...]
    """Segmentations (seg, lesion, mask …); `label()` refuses more than one."""
    unrecognised: tuple[Path, ...]
    """NIfTI files of this study whose names say no known modality."""
    confidence: Confidence = "sure"
    """How surely the name says who the patient is; see `visits`."""
    alike: str = ""
    """What the names of other studies of this patient may begin with, where the name leaves that open; else ''."""

    def files(self) -> list[tuple[str, tuple[Path, ...]]]:
        """What the files were recognised as, and the files."""
        return [*self.candidates.items(), (_LABEL, self.labels), (_OTHER, self.unrecognised)]

    def images(self) -> dict[str, Path]:
        """Modality → its file, in the order of `candidates`.

        Raises:
            NamingError: two files claim one modality, or one file two modalities (a mapping can do that).
        """
        images: dict[str, Path] = {}
        for modality, paths in self.candidates.items():
            if len(paths) > 1:
                raise NamingError(
                    f"{self.case}: {len(paths)} files claim to be {modality}: {_listed(paths)}. "
                    f"Keep one of them, or say which with a mapping such as {modality}='*_NAME.nii.gz'."
                )
            for other, path in images.items():
                if path == paths[0]:
                    raise NamingError(
                        f"{self.case}: {path} claims to be both {other} and {modality}. "
                        "Narrow the globs of the mapping until each file matches one."
                    )
            images[modality] = paths[0]
        return images

    def paths(self) -> list[Path]:
        """Every file of the study."""
        images = [path for paths in self.candidates.values() for path in paths]
        return [*images, *self.labels, *self.unrecognised]

    def label(self) -> Path | None:
        """The segmentation, or None where there is none.

        Raises:
            NamingError: there are several.
        """
        if len(self.labels) > 1:
            raise NamingError(
                f"{self.case}: {len(self.labels)} files claim to be the segmentation: {_listed(self.labels)}"
                ". Keep one of them, or say which with a mapping such as seg='*_NAME.nii.gz'."
            )
        return self.labels[0] if self.labels else None


def is_nifti(name: str) -> bool:
    """Whether a file's name ends as NIfTI's do."""
    return _NIFTI.search(name) is not None


def in_usual_order(modalities: Iterable[str]) -> list[str]:
    """Modalities as they are usually listed, unknown ones last."""
    return sorted(modalities, key=lambda m: (MODALITIES.index(m) if m in MODALITIES else len(MODALITIES), m))


def modality_name(text: str, extra: Collection[str] = ()) -> str:
    """The canonical name of a modality: 'T1CE' and 't1 gd' are t1c, 'FLAIR' is t2f; names in `extra` stay.

    Raises:
        ConfigError: no such modality.
    """
    if text in extra:
        return text
    meaning = _MEANING.get("-".join(_WORD.findall(text)).lower(), _OTHER)
    if meaning in MODALITIES:
        return meaning
    known = [*MODALITIES, *extra]
    spellings = [word for word, meaning in _MEANING.items() if meaning in MODALITIES] + list(extra)
    close = difflib.get_close_matches(text.lower(), spellings, n=1)
    hint = f" Did you mean {_MEANING.get(close[0], close[0])}?" if close else ""
    raise ConfigError(
        f"{text!r} is not a modality: expected one of {', '.join(known)} (or T1, T1ce, T2, FLAIR, PD).{hint}"
    )


def modality_names(given: Sequence[str]) -> tuple[str, ...]:
    """Modalities under their canonical names, each once: 'FLAIR' is ('t2f',); names that no spelling matches stay.

    A string is one modality, not its letters.

    Raises:
        ConfigError: none is given.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names:
        raise ConfigError("No modality is named; name one, such as 't2f', or leave the setting out for all.")
    spelt = {name: _MEANING.get("-".join(_WORD.findall(name)).lower(), name) for name in names}
    return tuple(dict.fromkeys(meaning if meaning in MODALITIES else name for name, meaning in spelt.items()))


def find_studies(folder: Path, mapping: Mapping[str, str] | None = None) -> list[StudyFiles]:
    """The studies under a folder (at any depth), or the one study that the folder is; sorted by case.

    Takes `.nii` and `.nii.gz`, and follows links. Skips hidden files and folders, folders ending in `.partial`, and the
    derivatives and sourcedata of a BIDS dataset, unless `folder` is such a folder itself. Returned paths are absolute.
    `mapping` is as in `recognise`.

    Raises:
        NamingError: the folder is missing, not a folder, not readable, or holds no NIfTI at all.
        ConfigError: a key of the mapping is not a name for a modality.
    """
    check_studies(folder)
    root = Path(os.path.abspath(folder))
    paths: list[Path] = []
    others, excluded = 0, set[str]()
    for place, folders, files in walk(root):
        derived = _BIDS_EXCLUDED & {*folders} if BIDS_ROOT in files else set[str]()
        excluded |= derived
        folders[:] = [name for name in folders if not name.endswith(".partial") and name not in derived]
        nifti = [name for name in files if is_nifti(name)]
        paths += [Path(place, name) for name in nifti]
        others += len(files) - len(nifti)
    if not paths:
        skipped = f", {' and '.join(sorted(excluded))} passed over: name such a folder itself" if excluded else ""
        raise NamingError(
            f"{folder}: no .nii or .nii.gz file in it or below ({others} other files{skipped}). "
            "Give the folder of the studies; convert DICOM with: crossmr convert FOLDER -o NIFTI."
        )
    return recognise(paths, mapping, root)


def unmatched(studies: Iterable[StudyFiles], mapping: Mapping[str, str] | None) -> list[str]:
    """What to say of each pattern of a mapping that matches no file of these studies."""
    names = {path.name for study in studies for path in study.paths()}
    return [
        f"--map {key}='{glob}' matches no file; files go by their names."
        for key, glob in (mapping or {}).items()
        if not any(fnmatch.fnmatchcase(name, glob) for name in names)
    ]


def study_of(files: Sequence[Path], mapping: Mapping[str, str] | None = None) -> StudyFiles:
    """The one study that these files are; its case is theirs if their names agree, else that of their folder.

    Raises:
        NamingError: a file that is no NIfTI, or whose name says no contrast. ConfigError: see `recognise`.
    """
    paths = [Path(os.path.abspath(path)) for path in files]
    for path in paths:
        if not is_nifti(path.name):
            raise NamingError(f"{path}: is not a .nii or .nii.gz file. Give NIfTI files, or the folder of the DICOM.")
    studies = recognise(paths, mapping)
    for path in (path for study in studies for path in study.unrecognised):
        raise NamingError(f"{path}: its name says no contrast. Name it with --map, such as t1n='{path.name}'.")
    names = {study.case for study in studies}
    case = names.pop() if len(names) == 1 else paths[0].parent.name or "study"
    patient = _Patient(studies[0].patient if len(studies) == 1 else case)
    return _study(case, [(m, p) for one in studies for m, files in one.files() for p in files], patient)


def recognise(
    paths: Iterable[Path], mapping: Mapping[str, str] | None = None, root: Path | None = None
) -> list[StudyFiles]:
    """Group NIfTI files into studies and tell their modalities and patients, from names only; sorted by case.

    The modality is the last word (or words: `T2_FLAIR`, `T1_Gd`) of the file name, in upper or lower case; words are
    separated by `-`, `_`, `.` and spaces. The text before it is the case; where there is none (`PATIENT1/t1.nii.gz`),
    the case is the folder's name, preceded by as many of its parents as make it unique. BIDS names are read by their
    entities: a `ce-` makes a T1w t1c, and the case is `sub-X[_ses-Y]`. Files of one case belong together, in whichever
    folders they are.

    A `mapping` from modality to a glob on the file name adds to these rules, for instance
    `{"t1n": "*_MPRAGE.nii.gz", "swi": "*_SWI*"}` (case-sensitive). A file that matches a glob is what the mapping says;
    all others go by the rules, but no other file of the same study is then taken for that modality. Keys are modalities
    in any spelling, `seg` for the segmentation, or new names in lower-case letters and digits. The case of a file that
    matches is what the leading `*` of the glob stands for (the shortest match, without trailing separators; in BIDS
    names `sub-X[_ses-Y]`), or else the folder's name.

    Raises:
        ConfigError: a key of the mapping is not a name for a modality.
    """
    readings = _readings(sorted(set(paths)), mapping)
    folder_names = _folder_names({_case_folder(path) for path, case, meaning in readings if meaning and not case}, root)
    named = [(path, case or folder_names[_case_folder(path)], meaning) for path, case, meaning in readings if meaning]
    cases = {case for _, case, meaning in named if meaning != _LABEL}
    cases_in_folder: dict[Path, set[str]] = defaultdict(set)  # of the images, not of the segmentations
    for path, case, meaning in named:
        if meaning != _LABEL:
            cases_in_folder[path.parent].add(case)

    studies: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path, case, meaning in named:
        # A segmentation of another name in a study's own folder is that study's (BraTS20_Training_355).
        own = _case_folder(path).name
        unmatched = meaning == _LABEL and case not in cases and cases_in_folder[path.parent] == {own}
        studies[own if unmatched else case].append((meaning, path))
    for path, case, meaning in readings:
        if not meaning:
            assigned = case or _assign(path, cases, cases_in_folder[path.parent], folder_names)
            studies[assigned].append((_OTHER, path))
    patients = _patients(studies, {case: folder for folder, case in folder_names.items()}, root)
    matched = {path for path, _, _ in readings if _matches(path, mapping)}
    return [_study(case, _preferring(matched, studies[case]), patients[case]) for case in sorted(studies)]


def _matches(path: Path, mapping: Mapping[str, str] | None) -> bool:
    return any(fnmatch.fnmatchcase(path.name, glob) for glob in (mapping or {}).values())


def _preferring(matched: Collection[Path], files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The files of a study, where what a mapping matched is preferred to what a name says."""
    mapped = {meaning for meaning, path in files if path in matched}
    return [(_OTHER if meaning in mapped and path not in matched else meaning, path) for meaning, path in files]


def _readings(paths: Iterable[Path], mapping: Mapping[str, str] | None) -> list[tuple[Path, str, str]]:
    """What each name says: (path, case, meaning), '' where it does not; a path comes once for each glob it matches."""
    globs = [(mapping_key(key), glob) for key, glob in (mapping or {}).items()]
    readings: list[tuple[Path, str, str]] = []
    for path in paths:
        matches = [(_glob_case(path.name, glob), key) for key, glob in globs if fnmatch.fnmatchcase(path.name, glob)]
        readings += [(path, *match) for match in matches or [_read_name(path.name)]]
    return readings


def _study(case: str, files: list[tuple[str, Path]], patient: "_Patient") -> StudyFiles:
    by_meaning: dict[str, list[Path]] = defaultdict(list)
    for meaning, path in files:
        by_meaning[meaning].append(path)
    custom = sorted(by_meaning.keys() - {*MODALITIES, _LABEL, _OTHER})
    return StudyFiles(
        case=case,
        patient=patient.name,
        confidence=patient.confidence,
        alike=patient.alike,
        candidates={name: tuple(by_meaning[name]) for name in (*MODALITIES, *custom) if name in by_meaning},
        labels=tuple(by_meaning.get(_LABEL, ())),
        unrecognised=tuple(by_meaning.get(_OTHER, ())),
    )


class _Patient(NamedTuple):
    """Whose a study is, by the names of its files and folders."""

    name: str
    confidence: Confidence = "sure"
    alike: str = ""
    folder: Path | None = None
    """The patient's folder, where a folder named them."""


def _patients(
    studies: Mapping[str, list[tuple[str, Path]]], folders: Mapping[str, Path], root: Path | None
) -> dict[str, _Patient]:
    """Case → patient; `folders` are those after which cases are called.

    Time points by which three or more studies, and no others, would all be of one patient are none, unless they are
    sure: `EORTC-26101-001` and so on may be the patients of one trial.
    """
    patients = {}
    for case, files in studies.items():
        patients[case] = _patient(case, folders.get(case), files[0][1], root)
    if len(patients) > 2 and len({(p.name, p.folder) for p in patients.values()}) == 1:
        patients = {case: p if p.confidence == "sure" else _Patient(case) for case, p in patients.items()}
    names = _folder_names({patient.folder for patient in patients.values() if patient.folder is not None}, root)
    return {
        case: patient if patient.folder is None else patient._replace(name=names[patient.folder])
        for case, patient in patients.items()
    }


def _patient(case: str, folder: Path | None, file: Path, root: Path | None) -> _Patient:
    """The patient that the case names, or else the folder that it is called after, or one above."""

    def below(place: Path) -> bool:
        return bool(place.name) and (root is None or root in place.parents)

    if folder is None:
        reading = read(case)
        if reading.patient:
            return _Patient(reading.patient, reading.confidence, look_alike(case))
        confidence, folder = reading.confidence, _case_folder(file)
    elif below(folder):
        confidence = "sure"
    else:
        return _Patient(case)
    for place in (folder, *folder.parents):
        if not below(place):
            break
        reading = read(place.name)
        confidence = max(confidence, reading.confidence, key=CONFIDENCES.index)
        if reading.patient:
            if place != folder and confidence == "weak" and not re.search(r"\d", reading.patient):
                break
            above = str(place.parent) if below(place.parent) and re.search(r"\d", place.parent.name) else ""
            alike = (look_alike(place.name) or above) if reading.patient == place.name and place == folder else ""
            own = place.with_name(reading.patient)
            while own.parent.name == own.name and below(own.parent):  # P1/P1_baseline
                own = own.parent
            return _Patient("", confidence, alike, own)
    return _Patient(case, alike=str(folder.parent) if below(folder) else "")


def _read_name(name: str) -> tuple[str, str]:
    """(case, meaning) of a file name, each '' where the name does not say it."""
    stem = _stem(name)
    if bids := _BIDS_FILE.fullmatch(stem):
        return _bids_case(stem), _bids_meaning(bids["suffix"], bids["entities"])
    words = list(_WORD.finditer(stem))
    for count in range(min(_LONGEST, len(words)), 0, -1):
        meaning = _MEANING.get("-".join(word[0] for word in words[-count:]).lower())
        if meaning is not None:
            return stem[: words[-count].start()].rstrip(_SEPARATORS) if meaning else "", meaning
    return "", _OTHER


def _bids_meaning(suffix: str, entities: str) -> str:
    meaning = _MEANING.get(suffix.lower(), _OTHER)
    if "_desc-synthetic" in entities or "_part-phase" in entities:
        return _OTHER
    if "_ce-" in entities:  # an enhanced T1w is t1c; no other enhanced image has a name here
        return {"t1n": "t1c", "t1c": "t1c", _LABEL: _LABEL}.get(meaning, _OTHER)
    return _OTHER if meaning == _LABEL and "_desc-brain" in entities else meaning


def _bids_case(stem: str) -> str:
    """`sub-X` or `sub-X_ses-Y` of a BIDS name, any other name as it is."""
    match = _BIDS_CASE.match(stem)
    return match[0] if match else stem


def mapping_key(key: str) -> str:
    """The canonical name that a key of a mapping stands for.

    Raises:
        ConfigError: a key that cannot name a modality.
    """
    meaning = _MEANING.get(key.lower(), _OTHER)
    if meaning or re.fullmatch(r"[a-z0-9]+", key):
        return meaning or key
    raise ConfigError(
        f"mapping: {key!r} cannot name a modality: expected one of {', '.join(MODALITIES)}, 'seg', "
        "or a new name in lower-case letters and digits, such as swi."
    )


def _glob_case(name: str, glob: str) -> str:
    if not glob.startswith("*"):
        return ""
    match = re.match("(.*?)" + fnmatch.translate(glob[1:]), name, re.DOTALL)
    return _bids_case(match[1].rstrip(_SEPARATORS)) if match else ""


def _assign(path: Path, cases: Collection[str], cases_in_folder: set[str], folder_names: Mapping[Path, str]) -> str:
    """The study of an unrecognised file: the longest case that its name begins with, else its folder's."""
    stem = _stem(path.name)
    for end in range(len(stem), 0, -1):
        if (end == len(stem) or stem[end] in _SEPARATORS) and stem[:end] in cases:
            return stem[:end]
    if len(cases_in_folder) == 1:
        return next(iter(cases_in_folder))
    folder = _case_folder(path)
    return folder_names.get(folder, folder.name or "study")


def _case_folder(path: Path) -> Path:
    """The folder whose name is the case of a file whose own name says none."""
    folder = path.parent
    while folder.name.lower() in _ANONYMOUS and folder.parent.name:
        folder = folder.parent
    return folder


def _folder_names(folders: Collection[Path], root: Path | None) -> dict[Path, str]:
    """Each folder's name, preceded by as many of its parents' names, below `root`, as make it unique."""
    names: dict[Path, str] = {}
    parts = {folder: _parts(folder, root) for folder in folders}
    depth, left = 0, set(folders)
    while left:
        depth += 1
        count = Counter(parts[folder][-depth:] for folder in folders)
        for folder in sorted(left):
            if count[parts[folder][-depth:]] == 1 or depth >= len(parts[folder]):
                names[folder] = "_".join(parts[folder][-depth:]) or "study"
        left -= names.keys()
    return names


def _parts(folder: Path, root: Path | None) -> tuple[str, ...]:
    """The names of a folder and of those above it that may become part of a study's name."""
    if root is not None and (folder == root or root in folder.parents):
        return folder.relative_to(root).parts or folder.parts[-1:]
    return tuple(part for part in folder.parts if part != folder.anchor)


def _stem(name: str) -> str:
    return _NIFTI.sub("", name)


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
