"""What names and sidecars of the Brain Imaging Data Structure say, by its specification 1.10 and habits beside it."""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from crossmr.data.contrast_agent import is_unclear, names_agent, says_agent
from crossmr.data.formats import stem_of
from crossmr.data.words import LABEL, OTHER, Reading, agent_of_word, possible_contrasts, spelt

ROOT = "dataset_description.json"
EXCLUDED = frozenset({"derivatives", "sourcedata", "code", "stimuli"})
"""Folders of a dataset that hold no scans of its own."""
_CASE = re.compile(r"sub-[A-Za-z0-9+]+(_sess?-[A-Za-z0-9+]+)?(?=_|$)")
"""OASIS-3 writes sess- for a session."""
_FILE = re.compile(
    _CASE.pattern + r"(?P<entities>(_[A-Za-z]+-[A-Za-z0-9+.]+)*)_(?P<suffix>[A-Za-z0-9]+)(?P<dup>__dup-?\d+)?"
)
_SUFFIXES = {"T1w": "t1n", "UNIT1": "t1n", "T2w": "t2w", "FLAIR": "t2f", "PDw": "pdw", "PD": "pdw", "PDT2": OTHER}
_NO_AGENT = re.compile(r"no|non|none|nil|na|false|without|wo|pre|plain", re.I)
_UNKNOWN = re.compile(r"\W*(unknown|n/?a|none|no|unspecified|undefined|null|anonymi[sz]ed|removed)?\W*", re.I)
_TISSUE = re.compile(
    r"(brain|head|skull|skullstrip(ped)?|bet|hdbet|synthstrip|tissues?|fast|c?aseg|aparc.*|carve.*|synthseg|cortex|"
    r"[gc]?gm|[cs]?wm|csf|bg|bone|softtissue|nonbrain|ribbon|hemi|thalamus|brainstem|cerebellum)",
    re.I,
)
"""What `desc-` and `label-` say of a mask that is of no lesion; the latter by the specification's list of tissues."""
_LESION = re.compile(r"lesion|tumou?r|wmh|stroke|infarct|edema|metast", re.I)
_FLUID = re.compile(r".*(flair|t2f|darkfluid|tirm).*", re.I)


def read_bids(stem: str) -> Reading | None:
    """What a name such as `sub-01_ses-02_ce-gadolinium_run-1_T1w` says; None where it is not of this form.

    The suffix is the contrast. `ce-` makes a T1w a T1ce, unless its value denies the agent (`none`); an `acq-` that
    names an agent does so, too. Phases, single inversions and enhanced images other than T1 are no contrast.
    """
    found = _FILE.fullmatch(stem)
    if found is None:
        return None
    entities = dict(entity.split("-", 1) for entity in found["entities"].split("_") if entity)
    meaning = _meaning(found["suffix"], entities)
    modality = meaning if meaning not in (LABEL, OTHER) else ""
    lesion = any(_LESION.search(text) for text in (found["suffix"], *(entities.get(k, "") for k in ("desc", "label"))))
    beside = [key for key in entities if key not in ("run", "ce")]
    beside += ["dseg"] * 3 if found["suffix"] == "dseg" and not lesion else []  # of tissues, as fMRIPrep's
    run = re.sub(r"\D", "", entities.get("run", "")) or "0"
    return Reading(
        case_of(stem),
        meaning=meaning,
        mask=meaning == LABEL or spelt(found["suffix"]) == LABEL,
        contrasts=(modality,) if modality else (),
        space=_SUFFIXES.get(entities.get("space", ""), ""),
        extras=len(beside),
        run=-1 if found["dup"] else int(run),
    )


def _meaning(suffix: str, entities: Mapping[str, str]) -> str:
    if suffix in ("PDT2", "MP2RAGE") or entities.get("part", "mag") != "mag" or "inv" in entities:
        return OTHER
    meaning = _SUFFIXES.get(suffix) or spelt(suffix)
    of_tissue = any(_TISSUE.fullmatch(entities.get(key, "")) for key in ("desc", "label"))
    if entities.get("desc", "").startswith("synthetic") or (meaning == LABEL and of_tissue):
        return OTHER
    acquisition = entities.get("acq", "")
    if meaning == "t2w" and _FLUID.fullmatch(acquisition):
        meaning = "t2f"
    agent = _agent(entities.get("ce"), acquisition)
    if meaning in ("t1n", "t1c"):
        return OTHER if agent is None else "t1c" if agent or meaning == "t1c" else "t1n"
    return OTHER if agent or (agent is None and meaning != LABEL) else meaning


def _agent(value: str | None, acquisition: str) -> bool | None:
    """Whether a contrast agent was given; None where `ce-` leaves that open."""
    if value is None:
        words = [acquisition, *re.split(r"(?<=[a-z0-9])(?=[A-Z])", acquisition)]
        said = [agent_of_word(word) for word in words]
        denied = False in said or says_agent(" ".join(words[1:])) is False  # noGd, but not gdNoFS
        return not denied and True in said
    if _NO_AGENT.fullmatch(value) or names_agent(value) is False:
        return False
    return None if _UNKNOWN.fullmatch(value) else True


def case_of(stem: str) -> str:
    """`sub-X` or `sub-X_ses-Y` of a name of this form, any other name as it is."""
    match = _CASE.match(stem)
    return match[0] if match else stem


def dataset_of(folder: Path) -> Path:
    """The BIDS dataset that a folder lies in, or is; else the folder itself."""
    return next((place for place in (folder, *folder.parents) if (place / ROOT).exists()), folder)


def last_runs(files: Mapping[Path, int]) -> list[Path]:
    """Of files and their runs, those of the last run of each name; what heudiconv calls `__dup` is older than all."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_name[re.sub(r"_run-\d+|__dup-?\d+", "", path.name)].append(path)
    last = {name: max(files[path] for path in paths) for name, paths in by_name.items()}
    return sorted(path for name, paths in by_name.items() for path in paths if files[path] == last[name])


def enhanced_by_sidecar(paths: Iterable[Path], sidecars: Collection[Path], root: Path) -> set[Path]:
    """Of images whose names leave open whether a T1 is enhanced, those whose sidecar names a contrast agent.

    A sidecar is `NAME.json` beside `NAME.nii.gz` (dcm2niix writes these, too), or one of the same suffix in a folder
    above up to `root` whose entities the image has (the specification's inheritance); the nearest one counts.
    """
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for sidecar in sidecars:
        by_folder[sidecar.parent].append(sidecar)
    found = set()
    for path in paths if sidecars else ():
        stem = stem_of(path.name)
        named = stem[len(case_of(stem)) :] if _FILE.fullmatch(stem) else stem
        if not {"t1n", "t1c"} <= possible_contrasts(named):
            continue
        for sidecar in _sidecars(path, stem, by_folder, root):
            if (agent := _agent_in(sidecar)) is not None:
                if agent:
                    found.add(path)
                break
    return found


def _sidecars(path: Path, stem: str, by_folder: Mapping[Path, list[Path]], root: Path) -> Iterable[Path]:
    """The sidecars of an image, the nearest first."""
    own = path.with_name(f"{stem}.json")
    if own in by_folder.get(path.parent, ()):
        yield own
    if _FILE.fullmatch(stem) is None:
        return
    parts = {*stem.split("_")}
    suffix = stem.rsplit("_", 1)[-1]
    for folder in path.parents:
        beside = [s for s in by_folder.get(folder, ()) if s != own and s.stem.split("_")[-1] == suffix]
        yield from sorted((s for s in beside if {*s.stem.split("_")} <= parts), key=lambda s: -len(s.stem))
        if folder == root:
            return


@lru_cache(maxsize=10_000)
def _agent_in(sidecar: Path) -> bool | None:
    """Whether a sidecar names an agent; None where it says nothing of one, or cannot be read."""
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    said = content.get("ContrastBolusIngredient") if isinstance(content, dict) else None
    text = " ".join(map(str, said)) if isinstance(said, list) else str(said or "")
    return True if is_unclear(text) else names_agent(text)
