"""Which file is which: studies and their modalities, from file names alone.

No channel order is ever assumed, and no file is opened here but for the header of one that may be crossmr's own.
`recognise` reads names; `find_studies` walks a folder and calls it. A study whose files are ambiguous is still listed:
its error comes from `StudyFiles.images()` or `.label()`, so that one patient never stops a cohort.
"""

import difflib
import fnmatch
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from crossmr.data.bids import EXCLUDED, ROOT, dataset_of, enhanced_by_sidecar, last_runs
from crossmr.data.formats import header_of, is_archive, is_nifti, is_volume, stem_of, without_images_of_pairs
from crossmr.data.mapping import alternatives
from crossmr.data.people import Patient, patients_by_name
from crossmr.data.tree import (
    NNUNET,
    Channels,
    File,
    NamesInTree,
    OwnersOfLabels,
    is_mask,
    read_channels,
)
from crossmr.data.visits import (
    Confidence,
)
from crossmr.data.words import (
    CONTRASTS,
    LABEL,
    OTHER,
    SEPARATORS,
    Reading,
    are_copies,
    holds_masks,
    is_raw,
    says_no_label,
    spelt,
)
from crossmr.errors import ConfigError, NamingError
from crossmr.files import walk
from crossmr.paths import check_studies

MODALITIES = CONTRASTS
"""Canonical names of the modalities that file names are searched for."""
DISPLAY_NAMES = {"t1n": "T1", "t1c": "T1ce", "t2w": "T2", "t2f": "FLAIR", "pdw": "PD"}
"""Names of the modalities for people to read."""

LONGEST = 160
"""Bytes of a case's name; file systems have names of 255, and what is written of a case has more in its own."""
_SPELLINGS = ("t1n", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2w", "t2", "t2f", "flair", "pdw", "pd")
"""Spellings of modalities that a misspelt one is compared with."""


def display_name(modality: str) -> str:
    """What people call a modality: T1ce for t1c; one that only a user knows by its own name."""
    return DISPLAY_NAMES.get(modality, modality)


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
    """Volumes of this study whose names say no known modality."""
    passed_over: tuple[Path, ...] = ()
    """Further images of a modality, and masks, beside plainer ones: `T1_bet` beside `T1`. None of them is used."""
    confidence: Confidence = "sure"
    """How surely the name says who the patient is; see `visits`."""
    alike: tuple[str, ...] = ()
    """How names of this patient's other studies may begin, as GBM_07, or end, as *P01; none where there is no doubt."""
    guessed: bool = False
    """Whether the segmentation is one by its folder, not by its name: one that is no valid one is then not used."""
    notes: tuple[str, ...] = ()
    """What is doubtful of the files: what the voxels said where their names left it open, or whose they are."""

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
    """Modalities under their canonical names, each once; names that no spelling matches stay.

    A string is what stands between its commas: 'T1, FLAIR' is ('t1n', 't2f').

    Raises:
        ConfigError: none is given, or a name spells several: 'T1ce FLAIR'.
    """
    texts = [given] if isinstance(given, str) else [*given] if isinstance(given, Iterable) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{given!r} names no modality; expected text such as 't2f', or a list of such.")
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("No modality is named; name one, such as 't2f', or leave the setting out for all.")
    for name in names:
        if several := _several(name):
            raise ConfigError(
                f"{name!r} names several modalities; expected one, or several with commas: {','.join(several)}."
            )
    meanings = {name: spelt(name) for name in names}
    return tuple(dict.fromkeys(meaning if meaning in MODALITIES else name for name, meaning in meanings.items()))


def _several(text: str) -> tuple[str, ...]:
    """The modalities that a text spells one after the other; none where it is one: 'T1-FLAIR', 'T2_FLAIR', 'T1 Gd'."""
    found = tuple(dict.fromkeys(m for word in re.split(r"[\W_]+", text) if (m := spelt(word)) in MODALITIES))
    one = found in (("t1n", "t2f"), ("t2w", "t2f")) and re.fullmatch(r"[\w.-]+", text)
    return found if len(found) > 1 and not one else ()


def find_studies(
    folder: Path, mapping: Mapping[str, str] | None = None, exclude: Collection[Path] = ()
) -> list[StudyFiles]:
    """The studies under a folder, or the one study that the folder is; sorted by case; see `find_all`."""
    return find_all(folder, mapping, exclude).studies


class Found(NamedTuple):
    """What lies under a folder."""

    studies: list[StudyFiles]
    """Sorted by case."""
    unused: list[Path]
    """Segmentations of no study, and volumes in folders of labels where the study has no segmentation."""


def find_all(folder: Path, mapping: Mapping[str, str] | None = None, exclude: Collection[Path] = ()) -> Found:
    """The studies under a folder (at any depth), or the one study that the folder is, and labels of none of them.

    Takes the volumes of every format that `formats` reads, and follows links. Skips hidden files and folders, folders
    ending in `.partial`, those in `exclude`, and the derivatives and sourcedata of a BIDS dataset, unless `folder` is
    such a folder itself. A folder within a BIDS dataset is read as the whole is: its studies are called the same, and
    sidecars that its images inherit from above count. What crossmr synthesised is no scan. Returned paths are absolute.
    `mapping` is as in `recognise`.

    Raises:
        NamingError: the folder is missing, not a folder, not readable, or holds no volume at all.
        ConfigError: a key of the mapping is not a name for a modality.
    """
    check_studies(folder)
    root = Path(os.path.abspath(folder))
    left_out = {os.path.abspath(place) for place in exclude}
    paths: list[Path] = []
    sidecars: set[Path] = set()
    others, packed, excluded = 0, "", set[str]()
    channels: dict[Path, Channels] = {}
    for place, folders, files in walk(root):
        derived = EXCLUDED & {*folders} if ROOT in files else set[str]()
        excluded |= derived
        folders[:] = [
            name
            for name in folders
            if not name.endswith(".partial") and name not in derived and os.path.join(place, name) not in left_out
        ]
        if NNUNET in files:
            channels[Path(place)] = read_channels(Path(place, NNUNET))
        volumes = [name for name in files if is_volume(name)]
        paths += [Path(place, name) for name in volumes]
        sidecars.update(Path(place, name) for name in files if name.endswith(".json"))
        others += len(without_images_of_pairs(files)) - len(volumes)
        packed = packed or next((f"; unpack archives such as {name}" for name in files if is_archive(name)), "")
    if not paths:
        beside = f", {' and '.join(sorted(excluded))} passed over: name such a folder itself" if excluded else packed
        raise NamingError(
            f"{folder}: no volume (.nii.gz, .mgz, .hdr, .mha, .nrrd …) in it or below ({others} other files{beside}). "
            "Give the folder of the studies; convert DICOM with: crossmr convert FOLDER -o NIFTI."
        )
    dataset = dataset_of(root)
    above = [folder for folder in root.parents if folder.is_relative_to(dataset)]
    sidecars.update(path for folder in above for path in folder.glob("*.json"))
    whole = dataset if above and (dataset / ROOT).is_file() else root
    found = _recognise(paths, mapping, whole, channels, enhanced_by_sidecar(paths, sidecars, dataset))
    return found._replace(studies=[_without_synthetic(study) for study in found.studies])


def _without_synthetic(study: StudyFiles) -> StudyFiles:
    """The study, of whose candidates those are passed over that crossmr synthesised.

    Of files that are alone only a standard deviation's is opened, `P1-t1c_std`: many a scan is called so, too.
    """
    doubtful = [paths for paths in study.candidates.values() if len(paths) > 1 or "_std." in paths[0].name]
    if not doubtful:
        return study
    from crossmr.data.nifti import is_synthetic

    synthetic = {path for paths in doubtful for path in paths if is_synthetic(path)}
    if not synthetic:
        return study
    left = {m: tuple(path for path in paths if path not in synthetic) for m, paths in study.candidates.items()}
    return replace(
        study,
        candidates={m: paths for m, paths in left.items() if paths},
        passed_over=tuple(sorted({*study.passed_over, *synthetic})),
    )


def unmatched(studies: Iterable[StudyFiles], mapping: Mapping[str, str] | None) -> list[str]:
    """What to say of each pattern of a mapping that matches no file of these studies."""
    names = {path.name for study in studies for path in study.paths()}
    return [
        f"--map {key}='{one}' matches no file; files go by their names."
        for key, glob in (mapping or {}).items()
        for one in alternatives(glob)
        if not any(fnmatch.fnmatchcase(name, one) for name in names)
    ]


def study_of(files: Sequence[Path], mapping: Mapping[str, str] | None = None) -> StudyFiles:
    """The one study that these files are; its case is theirs if their names agree, else that of their folder.

    Names of several patients or visits are a note of it.

    Raises:
        NamingError: a file that is no volume by its name, or whose name says no contrast. ConfigError: see `recognise`.
    """
    paths = [*dict.fromkeys(header_of(Path(os.path.abspath(path))) for path in files)]
    for path in paths:
        if not is_volume(path.name):
            raise NamingError(
                f"{path}: is no volume (.nii.gz, .mgz, .hdr, .mha, .nrrd …). Give volumes, or the folder of the DICOM."
            )
    studies = recognise(paths, mapping)
    for path in (path for study in studies for path in study.unrecognised):
        raise NamingError(f"{path}: its name says no contrast. Name it with --map, such as t1n='{path.name}'.")
    names = {study.case for study in studies}
    case = names.pop() if len(names) == 1 else paths[0].parent.name or "study"
    patient = Patient(studies[0].patient if len(studies) == 1 else case)
    together = NamesInTree(paths, mapping, None)
    study = _study(case, together.readings, patient, together)
    if len(heads := {reading.head for _, reading in together.readings if reading.head and not is_mask(reading)}) > 1:
        note = f"the names of its files begin with {_listed(sorted(heads))}: are they of one patient and one visit?"
        study = replace(study, notes=(note,))
    return study


def recognise(
    paths: Iterable[Path],
    mapping: Mapping[str, str] | None = None,
    root: Path | None = None,
    channels: Mapping[Path, Channels] | None = None,
    enhanced: Collection[Path] = (),
) -> list[StudyFiles]:
    """Group files of volumes into studies and tell their modalities and patients, from names only; sorted by case.

    1. A name is cut into words at `-`, `_`, `.`, spaces and brackets, and read from its end, as long as each word has a
       role: contrast, agent, sequence (`TSE`, `MPRAGE`), plane, step of processing (`bet`, `n4`), copy (`1`), space
       (`FLAIR_to_T1`, `rT1`), mask. `words` lists them, and glued ones (`3DT1GADO`, `CT1`) are cut. The text before is
       the case. `T1_FLAIR` is a T1, `T2_FLAIR` a FLAIR. A time point after the contrast is part of the case.
    2. Where the case's text says no time point, folders that are named after one follow: `P1/baseline/P1_T1` is of
       `P1_baseline`. Where it is empty or a time point alone, the case begins with the folder's name, which includes
       those above it below `root`, but none that says what its files are: their format, a step, one contrast. So it
       does not depend on what lies beside, but for a hash where A_B/C and A/B_C would be one. Without `root`, it is
       preceded by as many parents as make it unique. A text without a digit that lies in several folders, none of them
       named after it, is no patient's: `P1/final_T1` and `P2/final_T2` are of P1 and P2, or of P1_final where P1 has
       other texts, too; nor is what may say a series, a scanner or a form: `P1/Series003_T1`, `P1/3T_T1`. Where folders
       beside one another have images of one contrast of a case, all cases in them are called after them: `siteA/P1_T1`
       and `siteB/P1_T1` are of siteA_P1 and siteB_P1. But folders whose names differ in nothing but what the images
       are, or of which one name begins with the other, hold copies: `imgs`, `imgs_n4`.
    3. The other files of the folder settle what a name leaves open: T2 in `P1_T2_FLAIR` is a visit beside `P1_T2_T1`,
       `post` in `post_T1` beside `post_FLAIR`; 2 in `2_T1` is the patient's number where others share it; `P1_POST` is
       T1ce beside `P1_FLAIR`; a file alone in a folder named after a contrast is that.
    4. BIDS names are read by their entities (`bids.read_bids`; the case is `sub-X[_ses-Y]`), nnU-Net's `_0000` by the
       `dataset.json` above: `channels` are its modalities, by its folder. A T1 in `enhanced` is a T1ce, unless another
       file of the study is one by its name.
    5. Of several files of one contrast the one is taken that lies with most others, is registered to one of them, has
       fewest words beside, lies in the plane of most files, is the last run, and is NIfTI; the others are
       `passed_over`. Two alike are refused, by `StudyFiles.images()`.
    6. Masks and segmentations make no case: they join that of their name or folder. In a folder of labels, `labels/P1`
       is the segmentation of the one study that is called P1, or whose folder is, as is `labels/P1/seg`; but for files
       whose names say something else, or that lie in the folder of another case or time point. `masks/P1_T1` is a mask
       there where P1 has images elsewhere. Of several that are ones by their folders alone, none is used.

    A `mapping` from modality to a glob on the file name adds to these rules, for instance
    `{"t1n": "*_MPRAGE.nii.gz|*_BRAVO.nii.gz", "swi": "*_SWI*"}` (case-sensitive; of several globs with `|` between them
    any may match, `[|]` is the character). A file that matches a glob is what the mapping says; all others go by the
    rules, but no other file of the same study is then taken for that modality. Keys are modalities in any spelling,
    `seg` for the segmentation, or new names in lower-case letters and digits. The case of a file that matches is what
    the leading `*` of the glob stands for (the shortest match, without trailing separators; in BIDS names
    `sub-X[_ses-Y]`), or else the folder's name.

    Raises:
        ConfigError: a key of the mapping is not a name for a modality.
    """
    return _recognise(paths, mapping, root, channels, enhanced).studies


def _recognise(
    paths: Iterable[Path],
    mapping: Mapping[str, str] | None,
    root: Path | None,
    channels: Mapping[Path, Channels] | None,
    enhanced: Collection[Path],
) -> Found:
    """As `recognise`, with the labels of no study."""
    names = NamesInTree(sorted(set(paths)), mapping, root, channels, enhanced)
    named = [(path, names.case(path, reading), reading) for path, reading in names.readings if not is_mask(reading)]
    cases = {case for _, case, reading in named if reading.meaning}
    in_folder: dict[Path, set[str]] = defaultdict(set)  # cases of the images, by folders of files and of cases
    below: dict[Path, set[str]] = defaultdict(set)  # by these and all folders above
    contrasts: dict[Path, set[str]] = defaultdict(set)
    for path, case, reading in named:
        if reading.meaning:
            for folder in {path.parent, names.folder(path)}:
                in_folder[folder].add(case)
            for folder in path.parents:
                below[folder].add(case)
                contrasts[folder].add(reading.meaning)
    of_one = {
        folder: min(here) if below[folder] == here and len(here) == 1 else None for folder, here in in_folder.items()
    }

    owners = OwnersOfLabels([file for file in named if file[2].meaning], names)
    guessed = names.guessed
    studies: dict[str, list[File]] = defaultdict(list)
    unused: list[Path] = []
    for path, case, reading in named:
        stem = stem_of(path.name)
        may_label = not reading.meaning and (owners.knows(stem) or not says_no_label(stem))  # B12 is a patient
        if may_label and (labelled := owners.of(path, stem)):
            guessed.add(path)
            studies[labelled].append((path, Reading(meaning=LABEL, mask=True, extras=1)))
            continue
        own = case if reading.meaning or (reading.head and case in cases) else _assign(path, cases, of_one, names)
        if own in cases or not cases or not names.folder_of_labels(path):
            studies[own].append((path, reading))
        else:
            unused.append(path)
    for path, reading in names.readings:
        if is_mask(reading):
            own, reading = _of_mask(path, reading, cases, of_one, names, owners)
            # A mask makes no case, except where there is nothing else, or where a mapping says what it is.
            if own in cases or not named or path in names.mapped:
                studies[own].append((path, reading))
            elif reading.meaning == LABEL:
                unused.append(path)
    patients = patients_by_name(studies, names, root)
    found = [_study(case, studies[case], patients[case], names) for case in sorted(studies)]
    several = {folder for folder, cases in below.items() if len(cases) > 1 and len(contrasts[folder]) > 1}
    found = [replace(study, notes=(*study.notes, *_apart(study, several))) for study in found]
    unused += [
        path for study in found if not study.labels for path in study.unrecognised if names.folder_of_labels(path)
    ]
    return Found(found, sorted(unused))


def _apart(study: StudyFiles, several: Collection[Path]) -> list[str]:
    """What to say where images of a study lie in folders that may be two sites'; `several` hold cases and contrasts."""
    first, *others = [path for paths in study.candidates.values() for path in paths] or [Path()]
    for path in others:
        above = Path(os.path.commonpath([first.parent, path.parent]))
        if above in (first.parent, path.parent):
            continue
        one, other = (above / place.relative_to(above).parts[0] for place in (first, path))
        if above in several and (one in several or other in several) and not are_copies(one.name, other.name):
            return [f"its images lie in {one.name} and in {other.name}: are they of one patient?"]
    return []


def _of_mask(
    path: Path,
    reading: Reading,
    cases: Collection[str],
    of_one: Mapping[Path, str | None],
    names: NamesInTree,
    owners: OwnersOfLabels,
) -> tuple[str, Reading]:
    """The case of a mask, which need not be one of `cases`, and its reading."""
    case = names.case(path, reading) if reading.meaning else ""
    assigned = _assign(path, cases, of_one, names)
    own = case if case in cases or (case and assigned not in cases) else assigned
    beside = of_one.get(path.parent) == own
    if own in cases and not beside and owners.contradicts(path, "", own, named=True):
        own = case if case not in cases else ""
    if own not in cases and reading.meaning == LABEL:
        name = reading.head or (stem_of(path.name) if path in names.mapped else "")
        if labelled := owners.of(path, name):
            return labelled, replace(reading, head="", visit="")
    return own, reading


def _short(case: str) -> str:
    """A case's name, of which files can have names: a longer one's beginning, and a hash."""
    if len(name := case.encode(errors="surrogateescape")) <= LONGEST:
        return case
    return f"{name[: LONGEST - 9].decode(errors='ignore').rstrip()}-{hashlib.sha256(name).hexdigest()[:8]}"


def _study(case: str, files: list[File], patient: Patient, names: NamesInTree) -> StudyFiles:
    mapped = {reading.meaning for path, reading in files if path in names.mapped}
    by_meaning: dict[str, list[File]] = defaultdict(list)
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

    def rank(file: File, one_folder: bool) -> tuple[int, ...]:
        path, reading = file
        place = (-together[path.parent], int(is_raw(path.parent.name))) if one_folder else (0, 0)
        return *place, int(reading.space not in plain), reading.extras, int(not is_nifti(path.name))

    chosen = {}
    for modality, of in taken.items():
        one_folder = len({names.folder(path) for path, _ in of}) == 1
        best = min(rank(file, one_folder) for file in of)
        alike = [file for file in of if rank(file, one_folder) == best]
        planes = Counter(reading.plane for others in taken.values() for _, reading in others)
        most = max(planes[reading.plane] for _, reading in alike)
        in_plane = {path: reading.run for path, reading in alike if planes[reading.plane] == most}
        chosen[modality] = tuple(last_runs(in_plane))
    labels = _labels(case, by_meaning.get(LABEL, []), names)
    guessed = bool(labels) and {*labels} <= names.guessed
    notes: tuple[str, ...] = ()
    if guessed and len(labels) > 1:
        notes, labels = (_several_guessed(len(labels)),), ()
    used = {path for paths in (*chosen.values(), labels) for path in paths}
    others = [path for path, _ in by_meaning.get(OTHER, [])]
    return StudyFiles(
        case=_short(case),
        patient=patient.name,
        confidence=patient.confidence,
        alike=patient.alike,
        candidates=chosen,
        labels=labels,
        guessed=guessed,
        notes=notes,
        unrecognised=tuple(others),
        passed_over=tuple(sorted({path for path, _ in files} - used - {*others})),
    )


def _several_guessed(count: int) -> str:
    return (
        f"{count} files may be its segmentation, by the folders in which they lie: none is used. "
        "Call the one of the lesion after the study, such as NAME_seg.nii.gz."
    )


def _labels(case: str, files: Sequence[File], names: NamesInTree) -> tuple[Path, ...]:
    """The segmentation: of this very name, by a person, of no single contrast, with the fewest words beside.

    Of those that are ones by their folders alone, labels are preferred to masks, which may be of the brain. Masks of
    several contrasts, such as `P1_T1_mask` and `P1_T2_mask`, are none: they are of the head.
    """
    if not files:
        return ()

    def rank(file: File) -> tuple[int, ...]:
        path, reading = file
        folder = names.folder_of_labels(path) if path in names.guessed else None
        return (
            int(reading.head not in ("", case)),
            int(reading.automatic),
            int(bool(reading.contrasts)),
            int(path in names.guessed),
            int(folder is not None and holds_masks(folder.name)),
            reading.extras,
            int(not is_nifti(path.name)),
        )

    best = min(rank(file) for file in files)
    chosen = [file for file in files if rank(file) == best]
    if len({reading.contrasts for _, reading in chosen}) > 1:
        return ()
    return tuple(path for path, _ in chosen)


def _assign(path: Path, cases: Collection[str], of_one: Mapping[Path, str | None], names: NamesInTree) -> str:
    """The study of a file whose name says no contrast: the longest case that it begins with, else its folder's."""
    stem = stem_of(path.name)
    for end in range(len(stem), 0, -1):
        if end == len(stem) or stem[end] in SEPARATORS:
            own = f"{names.site(path, stem[:end])}{stem[:end]}"
            if own in cases:
                return own
    for folder in path.parents:
        if case := of_one.get(folder):
            return case
        if folder == names.root or folder in of_one:
            break
    folder = names.folder(path)
    return names.names.get(folder) or folder.name or "study"


def _listed(paths: Iterable[Path | str]) -> str:
    return ", ".join(map(str, paths))
