"""What the names of the files in a tree say: each by itself, and where that is open, by those that lie beside it.

`words` and `bids` read single names; `naming` makes studies of what is found here.
"""

import fnmatch
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from crossmr.data.bids import read_bids
from crossmr.data.formats import stem_of
from crossmr.data.mapping import alternatives, case_by_glob, mapping_key
from crossmr.data.visits import names_part, names_scan, parse_patient
from crossmr.data.words import (
    CONTRASTS,
    LABEL,
    OTHER,
    SEPARATORS,
    Reading,
    agent_of_word,
    are_copies,
    describes,
    differ_in_form,
    holds_kind_of_labels,
    holds_labels,
    is_raw,
    possible_contrasts,
    read_words,
    says_form,
    spelt,
)
from crossmr.files import digest

# Folders named after the kind of their files, not after a patient, such as BIDS' anat/.
_ANONYMOUS = frozenset(
    {"anat", "nifti", "nii", "mri", "images", "scans", "resources", "files"}
    | {"raw_data", "imagestr", "imagests", "labelstr", "labelsts"}
)
NNUNET = "dataset.json"
_ADNI = re.compile(r"ADNI_(?P<subject>\d{3}_S_\d{4,5})_M[RT]_(?P<what>.+?)(_[Bb]r)?(_raw)?_\d{14,}(_\d+)?_S\d+_I\d+")
_DEFORMATION = re.compile(r"(i?y|u|v|jy?|wj)_")
"""How SPM calls what leads from an image to a template: y_T1 of T1."""
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_AGENTS = re.compile(r"(pre|post|with|without|non?)[-_. ]?[a-z]", re.I)
"""How a folder's name begins that is of an agent and names no contrast: post_contrast, but not post, or contrast."""

BARE = re.compile(r"\d{1,3}|(19|20)\d\d")
"""A folder's name that may be a patient's of one cohort, or the number of a visit, but never tells people apart."""
MOST_FORMS = 20
"""Folders beside one another that may hold one cohort in several forms; more are sites, or patients."""
Channels = Mapping[str, str]
"""Number of a channel of nnU-Net, such as '0000' → the modality, '' where it is another."""


def read_channels(path: Path) -> Channels:
    """The modalities of the channels that a `dataset.json` of nnU-Net names; none where it is none."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        names = text.get("channel_names", text.get("modality", {}))
        return {f"{int(number):04d}": spelt(str(name)) for number, name in names.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def is_mask(reading: Reading) -> bool:
    return reading.mask or reading.meaning == LABEL


File = tuple[Path, Reading]


class _Beside:
    """What the files of one folder say of each other."""

    def __init__(self, files: Sequence[File]) -> None:
        sure = [reading for _, reading in files if reading.contrasts and not reading.doubt]
        self.heads = {reading.head for reading in sure}
        before = {r.head for r in sure if r.meaning == "t1c" and r.head.lower().endswith("pre")}  # before surgery
        self.heads |= {f"{head[:-3]}{post}" for head in before for post in ("post", "Post", "POST")}
        self.imaged = {reading.head for _, reading in files if reading.contrasts and not reading.mask}
        self.images = sum(not reading.mask for _, reading in files)
        numbered: dict[str, set[str]] = defaultdict(set)
        for path, reading in files:
            if reading.doubt == "number":
                numbered[read_words(stem_of(path.name), literal=True).head].add(reading.meaning)
        several = any(len(meanings) > 1 for meanings in numbered.values())
        one = len({meaning for meanings in numbered.values() for meaning in meanings}) == 1
        self.stems = {stem_of(path.name) for path, _ in files}
        self.numbers_patients = several or (one and len(numbered) > 1)
        """Whether the numbers before contrasts are patients': one is on several contrasts, or all are on one."""

    def has_tissues(self, stem: str) -> bool:
        """Whether a segmentation is FSL FAST's of the tissues: `T1_seg` beside the probabilities `T1_pve_0`."""
        others = ("pve_0", "pve_1", "pveseg", "mixeltype")
        return stem.endswith("_seg") and any(f"{stem.removesuffix('seg')}{other}" in self.stems for other in others)


class NamesInTree:
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
        self._no_case: dict[Path, bool] = {}
        globs = [(mapping_key(key), alternatives(glob)) for key, glob in (mapping or {}).items()]
        self.readings: list[File] = []
        beside: dict[Path, list[File]] = defaultdict(list)
        for path in paths:
            fitting = [(key, next((g for g in some if fnmatch.fnmatchcase(path.name, g)), "")) for key, some in globs]
            matches = [Reading(case_by_glob(path.name, glob), meaning=key) for key, glob in fitting if glob]
            if matches:
                self.mapped.add(path)
                self.readings += [(path, match) for match in matches]
            else:
                beside[path.parent].append(
                    (path, _channel(path, channels or {}) or _of_adni(path) or _read_name(path.name))
                )
        self._visits = _visits([file for files in beside.values() for file in files])
        self._below = _below([file for files in beside.values() for file in files], self.mapped)
        self._children: dict[Path, set[Path]] = defaultdict(set)
        for folder in self._below:
            self._children[folder.parent].add(folder)
        together = {folder: _Beside(files) for folder, files in beside.items()}
        for folder, files in beside.items():
            above = together.get(folder.parent)
            self.readings += [(path, self._settled(path, reading, together[folder], above)) for path, reading in files]
        self.readings.sort(key=lambda file: file[0])
        self._of_labels = self._folders_of_labels()
        self.guessed: set[Path] = set()
        """Files that are taken for segmentations by their folder, not by their name."""
        self.readings = [self._in_folder_of_labels(file) for file in self.readings]
        self._repeated: dict[Path, set[str]] = defaultdict(set)
        self._site_folders = self._sites()
        self.readings = [
            (path, replace(reading, head=f"{self.site(path, reading.head)}{reading.head}"))
            for path, reading in self.readings
        ]
        places = self._places()
        unnamed = {self.folder(path) for path, reading in self.readings if not parse_patient(reading.head).patient}
        unnamed |= {self.folder(path) for path in places} | {*places.values()}
        self.names = (
            _joined({folder: parts(folder, root) for folder in unnamed}) if root else folder_names(unnamed, None)
        )
        if places:
            self.readings = self._by_place(places)
        self._placed = {*places}

    def _settled(self, path: Path, reading: Reading, beside: "_Beside", above: "_Beside | None") -> Reading:
        """The reading that the other files of a folder leave of those that a name allows."""
        spm = _DEFORMATION.match(stem := stem_of(path.name))
        if spm and any(stem[spm.end() :] in files.stems for files in (beside, above) if files):
            return Reading()
        if reading.meaning == LABEL and beside.has_tissues(stem_of(path.name)):
            return replace(reading, meaning=OTHER)
        if reading.doubt:
            literal = read_words(stem_of(path.name), literal=True)
            if literal.visit != reading.visit:  # T1_post_1
                others = (literal.head, literal.visit) in self._visits
            elif reading.doubt == "number":
                others = beside.numbers_patients
            else:
                others = literal.head in beside.heads
            if others or (literal.visit == reading.visit and literal.head == path.parent.name):
                return literal
        if reading.meaning == "t1n" and not reading.mask and self._of_agent(path.parent):
            return replace(reading, meaning="t1c")
        if reading.weak and reading.head not in beside.imaged:
            return Reading()
        if not reading.meaning and not reading.mask and (said := self._said_by_folders_alike(path)):
            return Reading(stem_of(path.name), meaning=said)
        alone = not reading.meaning and not reading.mask and beside.images == 1
        if alone and path.parent.name and (said := self._said_by_folder(path)):
            return Reading(meaning=said)
        return reading

    def _folders_of_labels(self) -> set[Path]:
        """Folders below the root that are named after labels, but those of images, as tumor/ is with tumor/P1/T1.

        Of images it is where all images lie in such folders; if it is called after lesions, also where its cases have
        none elsewhere, or where one has several contrasts in it, or a contrast that it has elsewhere, too.
        """
        below_root = (folder for folder in self._below if self.root is not None and self.root in folder.parents)
        named = {folder for folder in below_root if holds_labels(folder.name)}
        inside: dict[Path, set[tuple[str, str]]] = defaultdict(set)
        outside: dict[str, set[str]] = defaultdict(set)
        for path, reading in self.readings:
            if reading.meaning in CONTRASTS and not reading.mask and path not in self.mapped:
                who = reading.head or self.folder(path).name
                within = named & {*path.parents}
                for folder in within:
                    inside[folder].add((who, reading.meaning))
                if not within:
                    outside[who].add(reading.meaning)
        found = {folder for folder in named if not inside[folder]}
        for folder in named - found:
            count = Counter(who for who, _ in inside[folder])
            twice = any(count[who] > 1 or meaning in outside.get(who, ()) for who, meaning in inside[folder])
            elsewhere = any(outside.get(who) for who in count) and not twice
            if elsewhere or (outside and holds_kind_of_labels(folder.name)):
                found.add(folder)
        return found

    def folder_of_labels(self, path: Path) -> Path | None:
        """The nearest folder above a file that holds labels of lesions."""
        return next((folder for folder in path.parents if folder in self._of_labels), None)

    def _in_folder_of_labels(self, file: File) -> File:
        """The file, as a mask where it has a contrast's name in a folder of labels: the one on which it was drawn."""
        path, reading = file
        if (
            is_mask(reading)
            or reading.meaning not in CONTRASTS
            or path in self.mapped
            or not self.folder_of_labels(path)
        ):
            return file
        self.guessed.add(path)
        return path, replace(reading, meaning=LABEL, mask=True, extras=reading.extras + 1)

    def telling_folders(self, path: Path) -> list[str]:
        """Names of the folders below the root that a file lies in, but of those that say what its files are."""
        within = [folder for folder in path.parents if self.root is None or self.root in folder.parents]
        return [f.name for f in reversed(within) if f.name and f not in self._of_labels and not self._says_no_case(f)]

    def _sites(self) -> dict[Path, str]:
        """Folders beside one another that are sites', and these: some case has images of one contrast in several.

        They hold no copies of one another (`are_copies`), and lie above the patients' own folders.
        """
        holding: dict[Path, dict[tuple[str, ...], set[Path]]] = defaultdict(lambda: defaultdict(set))
        for path, reading in self.readings:
            if reading.meaning in CONTRASTS and not reading.mask and path not in self.mapped:
                for folder in self._above_patient(path, reading.head):
                    what = (reading.head, reading.visit, *self._visits_above(path), reading.meaning)
                    holding[folder.parent][what].add(folder)
        found: dict[Path, str] = {}
        for together in holding.values():
            alike = {what: folders for what, folders in together.items() if len(folders) > 1}
            called = _called_after_sites({frozenset(folders) for folders in alike.values()})
            found |= called
            if called and all(names_part(folder.name) for folder in called):  # they have few cases in common
                for (head, *_), folders in alike.items():
                    for folder in folders & called.keys():
                        self._repeated[folder] |= {head, f"{called[folder]}_{head}"}
        return found

    def _above_patient(self, path: Path, head: str) -> list[Path]:
        """The folders below the root that a file lies in, above those that are named after its patient."""
        if self.root is None or not (patient := parse_patient(head).patient) or _is_vague(head):
            return []
        above: list[Path] = []
        for folder in path.parents:
            if folder == self.root or self.root not in folder.parents:
                break
            named = folder.name.startswith(patient) and folder.name[len(patient) :][:1] in ("", *SEPARATORS)
            above = [] if named or parse_patient(folder.name).patient == patient else [*above, folder]
        return above

    def site(self, path: Path, head: str) -> str:
        """What stands before the name of a case that lies in the folder of a site: `siteA_`; else ''."""
        if not self._site_folders or not head or _is_vague(head):
            return ""
        return "".join(
            f"{self._site_folders[place]}_"
            for place in reversed(path.parents)
            if place in self._site_folders and head in self._repeated.get(place, {head})
        )

    def _places(self) -> dict[Path, Path]:
        """Files whose heads name no patient, since they are vague and lie in several places, and these places."""
        found = {path: self._place(path, reading.head) for path, reading in self.readings if _is_vague(reading.head)}
        places: dict[str, dict[Path | None, set[str]]] = defaultdict(lambda: defaultdict(set))
        for path, reading in self.readings:
            if path in found and not is_mask(reading):
                places[reading.head][found[path]].add(reading.meaning)
        several = {head for head, held in places.items() if _lie_apart(held)}
        items = {head for head in places if _is_item(head)}
        of_items = {place for head in items & several for place in places[head]}
        several |= {head for head in items if of_items & {*places[head]}}
        return {
            path: place
            for path, reading in self.readings
            if reading.head in several and (place := found.get(path)) and place != self.root
        }

    def is_placed(self, path: Path) -> bool:
        """Whether a file's head is the name of its folder, since its own names no patient."""
        return path in self._placed

    def _by_place(self, places: Mapping[Path, Path]) -> list[File]:
        """The readings, with the place for a head that names no patient, or before it where the place has others.

        `P1/final_T1` and `P2/final_T2` are of P1 and P2; `HGG/Ann_T1`, with `HGG/Bob_T1` and `LGG/Ann_T1`, of HGG_Ann.
        Series of a place are of one patient, `P1/Series3_T1` and `P1/Series4_T2`: but S3 and S4 that both have a T1 are
        taken for patients.
        """
        heads: dict[Path | None, set[str]] = defaultdict(set)
        of_contrast: dict[tuple[Path | None, str], set[str]] = defaultdict(set)
        for path, reading in self.readings:
            if reading.head and not is_mask(reading):
                place = places.get(path) or self._place(path, reading.head)
                heads[place].add(reading.head)
                of_contrast[place, reading.meaning].add(reading.head)
        people = any(meaning and len({*filter(_may_be_person, of)}) > 1 for (_, meaning), of in of_contrast.items())
        told = []
        for path, reading in self.readings:
            if place := places.get(path):
                alone = "" if place in path.parents else self.names[place]
                several = len(heads[place] | {reading.head}) > 1
                if _is_item(reading.head):
                    several &= people and _may_be_person(reading.head)
                reading = replace(reading, head=f"{self.names[place]}_{reading.head}" if several else alone)
            told.append((path, reading))
        return told

    def _place(self, path: Path, head: str) -> Path | None:
        """The folder that a file's patient has, if any; None where the head, or how it begins, is a folder's name."""
        begins = {head[:end] for end in range(1, len(head) + 1) if head[end : end + 1] in SEPARATORS}
        if any(folder.name in begins for folder in path.parents if self.root is None or self.root in folder.parents):
            return None
        place = path.parent
        while (
            place != self.root
            and place.parent.name
            and (self._says_no_case(place) or not parse_patient(place.name).patient)
        ):
            place = place.parent
        said = read_words(place.name)  # P1-T1 is of P1, unless it is where nothing else is
        numbered = re.search(r"\d{3}", place.name[len(said.head) :])  # UCSF-PDGM-0004 is of nobody called UCSF
        named = place != self.root and said.head and said.meaning in CONTRASTS and not numbered
        return place.with_name(said.head) if named else place

    def _said_by_folders_alike(self, path: Path) -> str:
        """The contrast of a folder whose files are named after patients: `T1/P1.nii` beside `T2/P1.nii`.

        One of these folders holds several files, none says a contrast by its name, and another has this file, too.
        """
        said = _contrast_of_folder(path.parent.name)
        if not said or any(reading.meaning for _, reading in self._below[path.parent]):
            return ""
        others = self._children[path.parent.parent] - {path.parent}
        alike = [[file for file, _ in self._below[o]] for o in others if _contrast_of_folder(o.name) not in ("", said)]
        several = len(self._below[path.parent]) > 1 or any(len(files) > 1 for files in alike)
        same = any(file.name == path.name for files in alike for file in files)
        return said if several and same else ""

    def _said_by_folder(self, path: Path) -> str:
        """The contrast that a folder above is named after, if it holds nothing but this file: `scans/3-T2/NIFTI/x`."""
        folder = path.parent
        while folder.name.lower() in _ANONYMOUS and folder.parent.name:
            folder = folder.parent
        alone = len(self._below.get(folder, [])) == 1
        return _contrast_of_folder(folder.name) if alone and not stem_of(path.name).startswith("sub-") else ""

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
        if folder not in self._no_case:
            self._no_case[folder] = self._names_files(folder)
        return self._no_case[folder]

    def _names_files(self, folder: Path) -> bool:
        if folder.name.lower() in _ANONYMOUS or describes(folder.name):
            return True
        if folder.name.lower() == "pre":
            return any(is_raw(other.name) for other in self._siblings(folder))
        return self._of_one_contrast(folder) and not (
            re.fullmatch("t[12]", folder.name.lower())
            and any(
                re.fullmatch(r"t\d+", other.name.lower()) and not self._of_one_contrast(other)
                for other in self._siblings(folder)
            )
        )

    def _of_agent(self, folder: Path) -> bool:
        """Whether a folder is named after an enhanced T1, or its agent, and all its files after T1: `T1_post/T1`."""
        while folder.name.lower() in _ANONYMOUS and folder.parent.name:
            folder = folder.parent
        return self._says_agent(folder) == "t1c"

    def _says_agent(self, folder: Path) -> str:
        """T1 or T1ce, where a folder's name says an agent, or that none was given, and its files' names T1; else ''."""
        if folder == self.root or (self.root is not None and self.root not in folder.parents):
            return ""
        said = read_words(folder.name)
        space = said.space or "space" in folder.name.lower()
        if said.head or said.visit or said.mask or space or (said.weak and not _AGENTS.match(folder.name)):
            return ""
        files = [(path, reading) for path, reading in self._below.get(folder, []) if not reading.mask]
        plain = all(reading.meaning == "t1n" and not reading.space and not _says_plain(path) for path, reading in files)
        return said.meaning if plain and said.meaning in ("t1n", "t1c") else ""

    def _siblings(self, folder: Path) -> set[Path]:
        return self._children[folder.parent] - {folder}

    def _of_one_contrast(self, folder: Path) -> bool:
        """Whether a folder is named after a contrast, and so are its files, or their names say nothing."""
        said = _contrast_of_folder(folder.name)
        read_in_it = {reading.meaning for _, reading in self._below[folder] if not reading.mask}
        return (bool(said) and read_in_it <= {said, OTHER}) or bool(self._says_agent(folder))

    def case(self, path: Path, reading: Reading) -> str:
        """The case of a file: what its name begins with, or else its folder; with the time point, if it says one."""
        case = reading.head
        if not case or (path not in self.mapped and not parse_patient(case).patient):
            folder = self.folder(path)
            own = (
                self.names.get(folder) or "_".join(parts(folder, self.root) if self.root else [folder.name]) or "study"
            )
            said = case and own != case and not own.endswith(f"_{case}")  # week4/week4_T1 is of one week
            case = f"{own}_{case}" if said else own
        elif self.root and path not in self.mapped and not reading.visit and parse_patient(case).patient == case:
            case = "_".join([case, *self._visits_above(path)])
        return f"{case}_{reading.visit}" if reading.visit else case

    def _visits_above(self, path: Path) -> list[str]:
        """The folders below the root that are named after a time point alone: `P1/baseline/P1_T1`."""
        within = [folder for folder in path.parents if self.root in folder.parents]
        return [f.name for f in reversed(within) if not parse_patient(f.name).patient and not self._says_no_case(f)]


class OwnersOfLabels:
    """Whose a file in a folder of labels is, by its name and the folders that it lies in."""

    def __init__(self, images: Iterable[tuple[Path, str, Reading]], names: NamesInTree) -> None:
        self._names = names
        self._called: dict[str, set[str]] = defaultdict(set)
        self._whole: dict[frozenset[str], set[str]] = defaultdict(set)
        self._folders: dict[str, set[str]] = defaultdict(set)
        self._words: dict[str, set[str]] = defaultdict(set)
        for path, case, reading in images:
            folders = names.telling_folders(path)
            head = reading.head.removeprefix(names.site(path, reading.head))
            self._folders[case] |= {*folders}
            called = {case, head, reading.head, names.folder(path).name, parse_patient(case).patient} - {""}
            self._words[case] |= {*folders, *called, parse_patient(head).patient}
            self._whole[frozenset({*folders, head} - {""})].add(case)
            for name in called:
                if parse_patient(name).patient and not BARE.fullmatch(name):
                    self._called[name].add(case)
        self._known = {word for words in self._words.values() for word in words}

    def of(self, path: Path, name: str) -> str:
        """The only case that the file is of: by its name, or that of a folder below the one of labels; else ''.

        A number or a time point alone is nobody's: then all folders have to be those of the images.
        """
        folder = self._names.folder_of_labels(path)
        if folder is None:
            return ""
        cases = self._whole.get(frozenset({*self._names.telling_folders(path), name} - {""}), set())
        below = [place.name for place in path.parents if folder in place.parents]
        for one in (name, *below):
            if not cases:
                cases = {case for case in self._called.get(one, ()) if not self.contradicts(path, name, case)}
        return min(cases) if len(cases) == 1 else ""

    def knows(self, name: str) -> bool:
        """Whether some case is called so."""
        return name in self._called

    def contradicts(self, path: Path, name: str, case: str, *, named: bool = False) -> bool:
        """Whether a file's folders are those of another case or time point, or, unless it is `named`, unknown ones."""
        said = [*self._names.telling_folders(path), name]
        left = [word for word in said if word and word not in self._words[case]]
        if any(word in self._known or not parse_patient(word).patient for word in left):
            return True
        others = {word for word in self._folders[case] - {*said} if parse_patient(word).patient}
        return not named and any(not are_copies(word, other) for word in left for other in others)


def _called_after_sites(together: Collection[Collection[Path]]) -> dict[Path, str]:
    """Of folders that hold the same cases, those that hold no copies of all others: the name of their site, each."""
    site = {folder: [folder] for folders in together for folder in folders}
    for folders in together:
        for one, other in combinations(sorted(folders) if len(folders) <= MOST_FORMS else (), 2):
            if site[one] is not site[other] and are_copies(one.name, other.name):
                site[one] += site[other]
                site |= dict.fromkeys(site[other], site[one])
    several = [folders for folders in together if len({id(site[folder]) for folder in folders}) > 1]
    shortest = {folder: min(site[folder], key=lambda place: (len(place.name), place)) for folder in site}
    return {folder: shortest[folder].name for folders in several for folder in folders}


def _lie_apart(held: Mapping[Path | None, Collection[str]]) -> bool:
    """Whether places with the contrasts that they hold are several, and not copies of one: imgs and imgs_smoothed."""
    (first, contrasts), *others = held.items()
    for place, also in others:
        copies = first and place and first.parent == place.parent and differ_in_form(first.name, place.name)
        if not copies or not {*contrasts} & {*also}:
            return True
    return False


def _is_vague(head: str) -> bool:
    """Whether a head may name something else than a patient: it has no digit, or says a step, a space or a series."""
    patient = parse_patient(head).patient
    return bool(patient) and (describes(patient) or not re.search(r"\d", patient) or _is_item(head))


def _is_item(head: str) -> bool:
    """Whether a head says which series an image is, of which scanner, or in which form."""
    patient = parse_patient(head).patient
    return bool(patient) and (names_scan(patient) or says_form(patient))


def _may_be_person(head: str) -> bool:
    """Whether a head that may be a series' is one that may be a patient's: S003, unlike Series003."""
    return re.fullmatch(r"[A-Za-z]{1,2}-?\d+", head) is not None


def _contrast_of_folder(name: str) -> str:
    """The contrast that a folder's name says and nothing else, else ''."""
    said = read_words(name)
    return "" if said.head or said.visit or said.weak or said.meaning not in CONTRASTS else said.meaning


def _channel(path: Path, channels: Mapping[Path, Channels]) -> Reading | None:
    """What the `dataset.json` above a file of nnU-Net says of it, if there is one."""
    named = next((channels[folder] for folder in path.parents if folder in channels), None)
    if not named:
        return None
    stem = stem_of(path.name)
    if path.parent.name.lower().startswith("labels"):
        return Reading(stem, meaning=LABEL, mask=True)
    found = _CHANNEL.fullmatch(stem)
    meaning = named.get(found[2], OTHER) if found else OTHER
    return Reading(found[1], meaning=meaning, contrasts=(meaning,)) if found and meaning in CONTRASTS else None


def _of_adni(path: Path) -> Reading | None:
    """What a file as ADNI's archive names it says; the day of the scan is the name of a folder above."""
    found = _ADNI.fullmatch(stem_of(path.name))
    if not found:
        return None
    days = (re.match(r"(\d{4}-\d{2}-\d{2})_", folder.name) for folder in path.parents)
    day = next((day[1] for day in days if day), "")
    what = found["what"].replace("B1_Correction", "")
    may_be = possible_contrasts(what) - {"t1c"}  # no agent is given there
    meaning = min(may_be) if len(may_be) == 1 else OTHER
    words = len(re.findall(r"[A-Za-z0-9]+", found["what"]))
    return Reading("_".join(filter(None, (found["subject"], day))), meaning=meaning, extras=words)


def _says_plain(path: Path) -> bool:
    """Whether a file's name says that no agent was given: T1n, T1_pre, T1_native."""
    return any(agent_of_word(word) is False for word in re.split(r"[^A-Za-z0-9]+", stem_of(path.name)) if word)


def _visits(files: Iterable[File]) -> set[tuple[str, str]]:
    """Heads with the time points after their contrasts: of T2 or FLAIR, or of several T1 that else were of an agent."""
    found, doubtful = set(), defaultdict[tuple[str, str], set[str]](set)
    for path, reading in files:
        if reading.visit and not reading.doubt:
            found.add((reading.head, reading.visit))
        elif reading.doubt == "agent" and (literal := read_words(stem_of(path.name), literal=True)).visit:
            doubtful[literal.head, literal.visit.lower()[:3]].add(literal.visit)  # pre, post
    return found | {(head, visit) for (head, _), several in doubtful.items() if len(several) > 1 for visit in several}


def _below(files: Iterable[File], mapped: Iterable[Path]) -> dict[Path, list[File]]:
    """Each folder → the files in it and below."""
    below: dict[Path, list[File]] = defaultdict(list)
    for path, reading in [*files, *((path, Reading()) for path in mapped)]:
        for folder in path.parents:
            below[folder].append((path, reading))
    return below


def _read_name(name: str) -> Reading:
    """What a file name says by itself."""
    stem = stem_of(name)
    return read_bids(stem) or read_words(stem)


def _joined(words: Mapping[Path, tuple[str, ...]]) -> dict[Path, str]:
    """Each folder's words as one name, with a hash of them where another's would be the same: A_B/C and A/B_C."""
    names = {folder: "_".join(own) for folder, own in words.items()}
    count = Counter(names.values())
    return {
        folder: name if count[name] == 1 else f"{name}_{digest('/'.join(words[folder]))[:6]}"
        for folder, name in names.items()
    }


def folder_names(folders: Collection[Path], root: Path | None) -> dict[Path, str]:
    """Each folder's name, preceded by as many of its parents' names, below `root`, as make it unique."""
    names: dict[Path, tuple[str, ...]] = {}
    words = {folder: parts(folder, root) for folder in folders}
    depth, left = 0, set(folders)
    while left:
        depth += 1
        count = Counter(words[folder][-depth:] for folder in folders)
        for folder in sorted(left):
            if count[words[folder][-depth:]] == 1 or depth >= len(words[folder]):
                names[folder] = words[folder][-depth:] or ("study",)
        left -= names.keys()
    return _joined(names)


def parts(folder: Path, root: Path | None) -> tuple[str, ...]:
    """The names of a folder and of those above it that may become part of a study's name."""
    if root is not None and (folder == root or root in folder.parents):
        return folder.relative_to(root).parts or folder.parts[-1:]
    return tuple(part for part in folder.parts if part != folder.anchor)
