"""Which file is which: studies and their modalities, from file names alone.

No file is opened here, and no channel order is ever assumed. `recognise` reads names; `find_studies` walks a folder and
calls it. A study whose files are ambiguous is still listed: its error comes from `StudyFiles.images()` or `.label()`,
so that one patient never stops a cohort.
"""

import difflib
import fnmatch
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crossmr.data.bids import EXCLUDED, ROOT, case_of, enhanced_by_sidecar, last_runs, read_bids
from crossmr.data.visits import CONFIDENCES, Confidence, look_alike, read
from crossmr.data.words import LABEL, OTHER, Reading, describes, is_raw, possible_contrasts, spelt
from crossmr.data.words import read as read_words
from crossmr.errors import ConfigError, NamingError
from crossmr.files import walk
from crossmr.paths import check_studies

MODALITIES = ("t1n", "t1c", "t2w", "t2f", "pdw")
"""Canonical names of the modalities that file names are searched for."""
DISPLAY_NAMES = {"t1n": "T1", "t1c": "T1ce", "t2w": "T2", "t2f": "FLAIR", "pdw": "PD"}
"""Names of the modalities for people to read."""

_SPELLINGS = ("t1n", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2w", "t2", "t2f", "flair", "pdw", "pd")
"""Spellings of modalities that a misspelt one is compared with."""

_SEPARATORS = "-_. "
_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
# Folders named after the kind of their files, not after a patient, such as BIDS' anat/.
_ANONYMOUS = frozenset(
    {"anat", "nifti", "nii", "mri", "images", "scans", "resources", "files"}
    | {"raw_data", "imagestr", "imagests", "labelstr", "labelsts"}
)
_NNUNET = "dataset.json"
_ADNI = re.compile(r"ADNI_(?P<subject>\d{3}_S_\d{4,5})_M[RT]_(?P<what>.+?)(_[Bb]r)?(_raw)?_\d{14,}(_\d+)?_S\d+_I\d+")
_CHANNEL = re.compile(r"(.+)_(\d{4})")

Channels = Mapping[str, str]
"""Number of a channel of nnU-Net, such as '0000' → the modality, '' where it is another."""


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
    passed_over: tuple[Path, ...] = ()
    """Further images of a modality, and masks, beside plainer ones: `T1_bet` beside `T1`. None of them is used."""
    confidence: Confidence = "sure"
    """How surely the name says who the patient is; see `visits`."""
    alike: str = ""
    """What the names of other studies of this patient may begin with, where the name leaves that open; else ''."""

    def files(self) -> list[tuple[str, tuple[Path, ...]]]:
        """What the files were recognised as, and the files."""
        return [*self.candidates.items(), (LABEL, self.labels), (OTHER, (*self.unrecognised, *self.passed_over))]

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
        return [*images, *self.labels, *self.unrecognised, *self.passed_over]

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
    meaning = spelt(text)
    if meaning in MODALITIES:
        return meaning
    known = [*MODALITIES, *extra]
    close = difflib.get_close_matches(text.lower(), [*_SPELLINGS, *extra], n=1)
    hint = f" Did you mean {spelt(close[0]) or close[0]}?" if close else ""
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
    meanings = {name: spelt(name) for name in names}
    return tuple(dict.fromkeys(meaning if meaning in MODALITIES else name for name, meaning in meanings.items()))


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
    sidecars: set[Path] = set()
    others, excluded = 0, set[str]()
    channels: dict[Path, Channels] = {}
    for place, folders, files in walk(root):
        derived = EXCLUDED & {*folders} if ROOT in files else set[str]()
        excluded |= derived
        folders[:] = [name for name in folders if not name.endswith(".partial") and name not in derived]
        if _NNUNET in files:
            channels[Path(place)] = _read_channels(Path(place, _NNUNET))
        nifti = [name for name in files if is_nifti(name)]
        paths += [Path(place, name) for name in nifti]
        sidecars.update(Path(place, name) for name in files if name.endswith(".json"))
        others += len(files) - len(nifti)
    if not paths:
        skipped = f", {' and '.join(sorted(excluded))} passed over: name such a folder itself" if excluded else ""
        raise NamingError(
            f"{folder}: no .nii or .nii.gz file in it or below ({others} other files{skipped}). "
            "Give the folder of the studies; convert DICOM with: crossmr convert FOLDER -o NIFTI."
        )
    return recognise(paths, mapping, root, channels, enhanced_by_sidecar(paths, sidecars, root))


def _read_channels(path: Path) -> Channels:
    """The modalities of the channels that a `dataset.json` of nnU-Net names; none where it is none."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        names = text.get("channel_names", text.get("modality", {}))
        return {f"{int(number):04d}": spelt(str(name)) for number, name in names.items()}
    except (OSError, ValueError, AttributeError):
        return {}


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
    together = _Names(paths, mapping, None)
    return _study(case, together.readings, patient, together)


def recognise(
    paths: Iterable[Path],
    mapping: Mapping[str, str] | None = None,
    root: Path | None = None,
    channels: Mapping[Path, Channels] | None = None,
    enhanced: Collection[Path] = (),
) -> list[StudyFiles]:
    """Group NIfTI files into studies and tell their modalities and patients, from names only; sorted by case.

    1. A name is cut into words at `-`, `_`, `.`, spaces and brackets, and read from its end, as long as each word has a
       role: contrast, agent, sequence (`TSE`, `MPRAGE`), plane, step of processing (`bet`, `n4`), copy (`1`), space
       (`FLAIR_to_T1`, `rT1`), mask. `words` lists them, and glued ones (`3DT1GADO`, `CT1`) are cut. The text before is
       the case. `T1_FLAIR` is a T1, `T2_FLAIR` a FLAIR. A time point after the contrast is part of the case.
    2. Where the case's text says no time point, folders that are named after one follow: `P1/baseline/P1_T1` is of
       `P1_baseline`. Where it is empty or a time point alone, the case begins with the folder's name, which includes
       those above it below `root`, but none that says what its files are: their format, a step, one contrast. So it
       does not depend on what lies beside. Without `root`, it is preceded by as many parents as make it unique.
    3. The other files of the folder settle what a name leaves open: T2 in `P1_T2_FLAIR` is a visit beside `P1_T2_T1`,
       `post` in `post_T1` beside `post_FLAIR`; 2 in `2_T1` is the patient's number where others share it; `P1_POST` is
       T1ce beside `P1_FLAIR`; a file alone in a folder named after a contrast is that.
    4. BIDS names are read by their entities (`bids.read_bids`; the case is `sub-X[_ses-Y]`), nnU-Net's `_0000` by the
       `dataset.json` above: `channels` are its modalities, by its folder. A T1 in `enhanced` is a T1ce, unless another
       file of the study is one by its name.
    5. Of several files of one contrast the one is taken that lies with most others, is registered to one of them, has
       fewest words beside, and is the last run; the others are `passed_over`. Two alike are refused, by
       `StudyFiles.images()`.
    6. Masks and segmentations make no case: they join that of their name or folder.

    A `mapping` from modality to a glob on the file name adds to these rules, for instance
    `{"t1n": "*_MPRAGE.nii.gz", "swi": "*_SWI*"}` (case-sensitive). A file that matches a glob is what the mapping says;
    all others go by the rules, but no other file of the same study is then taken for that modality. Keys are modalities
    in any spelling, `seg` for the segmentation, or new names in lower-case letters and digits. The case of a file that
    matches is what the leading `*` of the glob stands for (the shortest match, without trailing separators; in BIDS
    names `sub-X[_ses-Y]`), or else the folder's name.

    Raises:
        ConfigError: a key of the mapping is not a name for a modality.
    """
    names = _Names(sorted(set(paths)), mapping, root, channels, enhanced)
    named = [(path, names.case(path, reading), reading) for path, reading in names.readings if not _is_mask(reading)]
    cases = {case for _, case, reading in named if reading.meaning}
    in_folder: dict[Path, set[str]] = defaultdict(set)  # cases of the images, by folders of files and of cases
    below: dict[Path, set[str]] = defaultdict(set)  # by these and all folders above
    for path, case, reading in named:
        if reading.meaning:
            for folder in {path.parent, names.folder(path)}:
                in_folder[folder].add(case)
            for folder in path.parents:
                below[folder].add(case)
    of_one = {
        folder: min(here) if below[folder] == here and len(here) == 1 else None for folder, here in in_folder.items()
    }

    studies: dict[str, list[_File]] = defaultdict(list)
    for path, case, reading in named:
        studies[
            case if reading.meaning or (reading.head and case in cases) else _assign(path, cases, of_one, names)
        ].append((path, reading))
    for path, reading in names.readings:
        if _is_mask(reading):
            case = names.case(path, reading) if reading.meaning else ""
            own = _assign(path, cases, of_one, names)
            own = case if case in cases or (case and own not in cases) else own
            # A mask makes no case, except where there is nothing else, or where a mapping says what it is.
            if own in cases or not named or path in names.mapped:
                studies[own].append((path, reading))
    patients = _patients(studies, names, root)
    return [_study(case, studies[case], patients[case], names) for case in sorted(studies)]


def _is_mask(reading: Reading) -> bool:
    return reading.mask or reading.meaning == LABEL


_File = tuple[Path, Reading]


class _Beside:
    """What the files of one folder say of each other."""

    def __init__(self, files: Sequence[_File]) -> None:
        self.heads = {reading.head for _, reading in files if reading.contrasts and not reading.doubt}
        self.imaged = {reading.head for _, reading in files if reading.contrasts and not reading.mask}
        self.images = sum(not reading.mask for _, reading in files)
        numbered: dict[str, set[str]] = defaultdict(set)
        for path, reading in files:
            if reading.doubt == "number":
                numbered[read_words(_stem(path.name), literal=True).head].add(reading.meaning)
        several = any(len(meanings) > 1 for meanings in numbered.values())
        one = len({meaning for meanings in numbered.values() for meaning in meanings}) == 1
        self.numbers_patients = several or (one and len(numbered) > 1)
        """Whether the numbers before contrasts are patients': one is on several contrasts, or all are on one."""


class _Names:
    """What the names of all files say together: each name by itself, and where that is open, by those beside it."""

    def __init__(
        self,
        paths: Sequence[Path],
        mapping: Mapping[str, str] | None,
        root: Path | None,
        channels: Mapping[Path, Channels] | None = None,
        enhanced: Collection[Path] = (),
    ) -> None:
        self.root = root
        self.enhanced = enhanced
        self.mapped: set[Path] = set()
        self._folders: dict[Path, Path] = {}
        globs = [(mapping_key(key), glob) for key, glob in (mapping or {}).items()]
        self.readings: list[_File] = []
        beside: dict[Path, list[_File]] = defaultdict(list)
        for path in paths:
            matches = [Reading(_glob_case(path.name, g), meaning=key) for key, g in globs if _fits(path, g)]
            if matches:
                self.mapped.add(path)
                self.readings += [(path, match) for match in matches]
            else:
                beside[path.parent].append(
                    (path, _channel(path, channels or {}) or _of_adni(path) or _read_name(path.name))
                )
        self._below = _below([file for files in beside.values() for file in files], self.mapped)
        self._children: dict[Path, set[Path]] = defaultdict(set)
        for folder in self._below:
            self._children[folder.parent].add(folder)
        for files in beside.values():
            together = _Beside(files)
            self.readings += [(path, self._settled(path, reading, together)) for path, reading in files]
        self.readings.sort(key=lambda file: file[0])
        unnamed = {self.folder(path) for path, reading in self.readings if not reading.head}
        self.names = (
            {folder: "_".join(_parts(folder, root)) for folder in unnamed} if root else _folder_names(unnamed, None)
        )

    def _settled(self, path: Path, reading: Reading, beside: "_Beside") -> Reading:
        """The reading that the other files of a folder leave of those that a name allows."""
        if reading.doubt:
            literal = read_words(_stem(path.name), literal=True)
            if literal.head == path.parent.name or (
                beside.numbers_patients if reading.doubt == "number" else literal.head in beside.heads
            ):
                return literal
        if reading.weak and reading.head not in beside.imaged:
            return Reading()
        alone = not reading.meaning and not reading.mask and beside.images == 1
        if alone and path.parent.name and (said := self._said_by_folder(path)):
            return Reading(meaning=said)
        return reading

    def _said_by_folder(self, path: Path) -> str:
        """The contrast that a folder above is named after, if it holds nothing but this file: `scans/3-T2/NIFTI/x`."""
        folder = path.parent
        while folder.name.lower() in _ANONYMOUS and folder.parent.name:
            folder = folder.parent
        said = read_words(folder.name)
        beneath = self._below.get(folder, [])
        whole = not said.head and not said.visit and not said.weak and said.meaning in MODALITIES
        return said.meaning if whole and len(beneath) == 1 and not _stem(path.name).startswith("sub-") else ""

    def folder(self, path: Path) -> Path:
        """The folder whose name is the case of a file whose own name says none."""
        if path.parent not in self._folders:
            folder = path.parent
            while folder != self.root and folder.parent.name and self._says_no_case(folder):
                folder = folder.parent
            self._folders[path.parent] = folder
        return self._folders[path.parent]

    def _says_no_case(self, folder: Path) -> bool:
        """Whether a folder is named after what its files are: their format, a step of processing, their contrast."""
        if folder.name.lower() in _ANONYMOUS or describes(folder.name):
            return True
        siblings = self._children[folder.parent] - {folder}
        if folder.name.lower() == "pre":
            return any(is_raw(other.name) for other in siblings)
        return self._of_one_contrast(folder) and not (
            re.fullmatch("t[12]", folder.name.lower())
            and any(
                re.fullmatch(r"t\d+", other.name.lower()) and not self._of_one_contrast(other) for other in siblings
            )
        )

    def _of_one_contrast(self, folder: Path) -> bool:
        """Whether a folder is named after a contrast, and so are its files, or their names say nothing."""
        said = read_words(folder.name)
        if said.head or said.visit or said.weak or said.meaning not in MODALITIES:
            return False
        return {reading.meaning for _, reading in self._below[folder] if not reading.mask} <= {said.meaning, OTHER}

    def case(self, path: Path, reading: Reading) -> str:
        """The case of a file: what its name begins with, or else its folder; with the time point, if it says one."""
        case = reading.head
        if not case or (path not in self.mapped and not read(case).patient):
            folder = self.folder(path)
            own = (
                self.names.get(folder) or "_".join(_parts(folder, self.root) if self.root else [folder.name]) or "study"
            )
            said = case and own != case and not own.endswith(f"_{case}")  # week4/week4_T1 is of one week
            case = f"{own}_{case}" if said else own
        elif self.root and path not in self.mapped and not reading.visit and read(case).patient == case:
            case = "_".join([case, *self._visits_above(path)])
        return f"{case}_{reading.visit}" if reading.visit else case

    def _visits_above(self, path: Path) -> list[str]:
        """The folders below the root that are named after a time point alone: `P1/baseline/P1_T1`."""
        within = [folder for folder in path.parents if self.root in folder.parents]
        return [f.name for f in reversed(within) if not read(f.name).patient and not self._says_no_case(f)]


def _channel(path: Path, channels: Mapping[Path, Channels]) -> Reading | None:
    """What the `dataset.json` above a file of nnU-Net says of it, if there is one."""
    named = next((channels[folder] for folder in path.parents if folder in channels), None)
    if not named:
        return None
    stem = _stem(path.name)
    if path.parent.name.lower().startswith("labels"):
        return Reading(stem, meaning=LABEL, mask=True)
    found = _CHANNEL.fullmatch(stem)
    meaning = named.get(found[2], OTHER) if found else OTHER
    return Reading(found[1], meaning=meaning, contrasts=(meaning,)) if found and meaning in MODALITIES else None


def _of_adni(path: Path) -> Reading | None:
    """What a file as ADNI's archive names it says; the day of the scan is the name of a folder above."""
    found = _ADNI.fullmatch(_stem(path.name))
    if not found:
        return None
    days = (re.match(r"(\d{4}-\d{2}-\d{2})_", folder.name) for folder in path.parents)
    day = next((day[1] for day in days if day), "")
    what = found["what"].replace("B1_Correction", "")
    may_be = possible_contrasts(what) - {"t1c"}  # no agent is given there
    meaning = min(may_be) if len(may_be) == 1 else OTHER
    words = len(re.findall(r"[A-Za-z0-9]+", found["what"]))
    return Reading("_".join(filter(None, (found["subject"], day))), meaning=meaning, extras=words)


def _fits(path: Path, glob: str) -> bool:
    return fnmatch.fnmatchcase(path.name, glob)


def _below(files: Iterable[_File], mapped: Iterable[Path]) -> dict[Path, list[_File]]:
    """Each folder → the files in it and below."""
    below: dict[Path, list[_File]] = defaultdict(list)
    for path, reading in [*files, *((path, Reading()) for path in mapped)]:
        for folder in path.parents:
            below[folder].append((path, reading))
    return below


def _study(case: str, files: list[_File], patient: "_Patient", names: _Names) -> StudyFiles:
    mapped = {reading.meaning for path, reading in files if path in names.mapped}
    by_meaning: dict[str, list[_File]] = defaultdict(list)
    for path, reading in files:  # what a mapping matched is preferred to what a name says
        beside = reading.meaning in mapped and path not in names.mapped
        by_meaning[OTHER if beside else reading.meaning].append((path, reading))
    if "t1c" not in by_meaning:
        t1 = by_meaning.pop("t1n", [])
        for path, reading in t1:
            by_meaning["t1c" if path in names.enhanced else "t1n"].append((path, reading))
    custom = sorted(by_meaning.keys() - {*MODALITIES, LABEL, OTHER})
    taken = {m: by_meaning[m] for m in (*MODALITIES, *custom) if m in by_meaning}
    plain = {m for m, of in taken.items() if any(not reading.space for _, reading in of)}
    together = Counter(folder for of in taken.values() for folder in {path.parent for path, _ in of})

    def rank(file: _File, one_folder: bool) -> tuple[int, ...]:
        path, reading = file
        place = (-together[path.parent], int(is_raw(path.parent.name))) if one_folder else (0, 0)
        return *place, int(reading.space not in plain), reading.extras

    chosen = {}
    for modality, of in taken.items():
        one_folder = len({names.folder(path) for path, _ in of}) == 1
        best = min(rank(file, one_folder) for file in of)
        alike = {path: reading.run for path, reading in of if rank((path, reading), one_folder) == best}
        chosen[modality] = tuple(last_runs(alike))
    labels = _labels(case, by_meaning.get(LABEL, []))
    used = {path for paths in (*chosen.values(), labels) for path in paths}
    others = [path for path, _ in by_meaning.get(OTHER, [])]
    return StudyFiles(
        case=case,
        patient=patient.name,
        confidence=patient.confidence,
        alike=patient.alike,
        candidates=chosen,
        labels=labels,
        unrecognised=tuple(others),
        passed_over=tuple(sorted({path for path, _ in files} - used - {*others})),
    )


def _labels(case: str, files: Sequence[_File]) -> tuple[Path, ...]:
    """The segmentation: of this very name, by a person, of no single contrast, with the fewest words beside.

    Masks of several contrasts, such as `P1_T1_mask` and `P1_T2_mask`, are none: they are of the head.
    """
    if not files:
        return ()

    def rank(reading: Reading) -> tuple[int, ...]:
        return (
            int(reading.head not in ("", case)),
            int(reading.automatic),
            int(bool(reading.contrasts)),
            reading.extras,
        )

    best = min(rank(reading) for _, reading in files)
    chosen = [(path, reading) for path, reading in files if rank(reading) == best]
    if len({reading.contrasts for _, reading in chosen}) > 1:
        return ()
    return tuple(path for path, _ in chosen)


class _Patient(NamedTuple):
    """Whose a study is, by the names of its files and folders."""

    name: str
    confidence: Confidence = "sure"
    alike: str = ""
    folder: Path | None = None
    """The patient's folder, where a folder named them."""


def _patients(studies: Mapping[str, list[_File]], names: _Names, root: Path | None) -> dict[str, _Patient]:
    """Case → patient.

    Time points by which three or more studies, and no others, would all be of one patient are none, unless they are
    sure: `EORTC-26101-001` and so on may be the patients of one trial.
    """
    folders = {case: folder for folder, case in names.names.items()}
    patients = {}
    for case, files in studies.items():
        path, reading = next((file for file in files if file[1].meaning), files[0])
        own = folders.get(case)
        if (own is None and not reading.head and reading.visit) or (
            case != reading.head and not read(reading.head).patient
        ):
            own = names.folder(path)
        patients[case] = _patient(case, own, names.folder(path), root)
    if len(patients) > 2 and len({(p.name, p.folder) for p in patients.values()}) == 1:
        patients = {case: p if p.confidence == "sure" else _Patient(case) for case, p in patients.items()}
    called = _folder_names({patient.folder for patient in patients.values() if patient.folder is not None}, root)
    return {
        case: patient if patient.folder is None else patient._replace(name=called[patient.folder])
        for case, patient in patients.items()
    }


def _patient(case: str, folder: Path | None, place_of_files: Path, root: Path | None) -> _Patient:
    """The patient that the case names, or else the folder that it is called after, or one above."""

    def below(place: Path) -> bool:
        return bool(place.name) and (root is None or root in place.parents)

    if folder is None:
        reading = read(case)
        if reading.patient:
            return _Patient(reading.patient, reading.confidence, look_alike(case))
        confidence, folder = reading.confidence, place_of_files
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


def _read_name(name: str) -> Reading:
    """What a file name says by itself."""
    stem = _stem(name)
    return read_bids(stem) or read_words(stem)


def mapping_key(key: str) -> str:
    """The canonical name that a key of a mapping stands for.

    Raises:
        ConfigError: a key that cannot name a modality.
    """
    meaning = spelt(key.lower())
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
    return case_of(match[1].rstrip(_SEPARATORS)) if match else ""


def _assign(path: Path, cases: Collection[str], of_one: Mapping[Path, str | None], names: _Names) -> str:
    """The study of a file whose name says no contrast: the longest case that it begins with, else its folder's."""
    stem = _stem(path.name)
    for end in range(len(stem), 0, -1):
        if (end == len(stem) or stem[end] in _SEPARATORS) and stem[:end] in cases:
            return stem[:end]
    for folder in path.parents:
        if case := of_one.get(folder):
            return case
        if folder == names.root or folder in of_one:
            break
    folder = names.folder(path)
    return names.names.get(folder) or folder.name or "study"


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
