"""Which studies there are, and what would be synthesised of which: nothing is written.

Names, headers and tags say it. Voxels are read where these leave open which of several T1 has the contrast agent, or
whether a volume is a scan or a segmentation.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crossmr.baselines import together
from crossmr.completion.layout import EXPECTED, Layout, records_of
from crossmr.completion.ownership import Now, arrived, other_scans, redo_reason, why_not_kept, why_not_undone
from crossmr.completion.private import SCANS
from crossmr.completion.unread import (
    Unread,
    dicom_beside,
    files_beside,
    reasons,
    unread_files,
    unread_series,
    why_passed_over,
    why_unread,
)
from crossmr.completion.verdict import despite
from crossmr.data.enhancement import doubtful_files, tell_apart
from crossmr.data.mapping import mapping_key
from crossmr.data.naming import StudyFiles, find_studies, in_usual_order, recognise, study_of, unmatched
from crossmr.data.study import check_headers
from crossmr.data.words import possible_contrasts
from crossmr.dicom.convert import Scans, convert_case, find_cases, hash_of_images, other_series
from crossmr.dicom.folders import holds_dicom
from crossmr.dicom.selection import choose
from crossmr.dicom.series import Series, own_series
from crossmr.dicom.series_table import BY_PERSON, is_of_person
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError
from crossmr.files import listed_once, read_json
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import CrossConditionedModel

_BESIDE = "is not read; the terminal names it, its name may be the patient's: move it away, or complete it as NIfTI"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The studies that a user named: of NIfTI, or of DICOM that is not converted yet."""

    root: Path
    """The folder that holds them all."""
    studies: Sequence[StudyFiles] = ()
    series: Mapping[str, Sequence[Series]] | None = None
    """Case → series of its study; None where the inputs are NIfTI."""
    beside: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    """Case → files that lie by its own and are of no format that is read."""
    dicom: Mapping[str, Sequence[Unread]] = field(default_factory=dict)
    """Case → DICOM that lies by its NIfTI."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Case → why the output has no place for it."""
    listed: frozenset[str] = frozenset()
    """The cases of which a person's table of the series has a line; see choice.py."""

    @property
    def cases(self) -> list[str]:
        """The names of the studies."""
        return [*self.series] if self.series is not None else [files.case for files in self.studies]

    def only(self, case: str) -> "Inputs":
        """One of these studies, with what is known of it."""
        beside, dicom, faults = (
            {case: known[case]} if case in known else {} for known in (self.beside, self.dicom, self.faults)
        )
        series = None if self.series is None else {case: self.series[case]}
        files = [self.by_case[case]] if series is None else []
        return Inputs(self.root, files, series, beside, dicom, faults, self.listed & {case})  # type: ignore[arg-type]

    @cached_property
    def by_case(self) -> Mapping[str, StudyFiles]:
        """Case → its files, where they are NIfTI."""
        return {files.case: files for files in self.studies}

    def unread(self, files: StudyFiles, acquired: Sequence[str], model: CrossConditionedModel) -> list[Unread]:
        """What of a study is not used and may be a contrast that it seems to lack."""
        wanted, others = lacking(acquired, model), self.beside.get(files.case, ())
        if self.series is not None:
            found = [
                replace(one, name="a file beside the DICOM", why=_BESIDE, called="")
                for one in unread_files(files, others, wanted)
            ]
            return [*unread_series(self.series[files.case]), *found]
        return [*unread_files(files, others, wanted), *self.dicom.get(files.case, ())]

    def chosen_since(self, manifest: Mapping[str, Any], case: str) -> list[str]:
        """The contrasts that a finished case has now from other series, or from none, if a person says so, or said it.

        [] where the table has no line of the study, or where the case was made of another study's series.
        """
        before, whys = _taken_before(manifest), self._whys(manifest, case)
        if case not in self.listed or self.series is None or not whys:
            return []
        now, changed, by_person = choose(self.series[case])[0], list[str](), False
        for modality in in_usual_order({*before, *now}):
            was, one = before.get(modality, {}), now.get(modality)
            then, today = was.get("why") == BY_PERSON, one is not None and one.why == BY_PERSON
            if modality in before and one and (was.get("of"), then) == (hash_of_images(one), today):
                continue
            changed.append(modality)
            by_person |= today or is_of_person(was.get("why", "")) or is_of_person(whys.get(was.get("of", ""), ""))
            by_person |= one is not None and _was_refused(one, manifest)
        return changed if by_person else []

    def undone(self, manifest: Mapping[str, Any], case: str) -> list[str]:
        """The contrasts for which a finished case would lose what a person chose, as no table says it now."""
        if case in self.listed or self.series is None or not self._whys(manifest, case):
            return []
        before, now = _taken_before(manifest), choose(self.series[case])[0]
        lost = {m for m, was in before.items() if was.get("why") == BY_PERSON}
        lost -= {m for m, one in now.items() if before.get(m, {}).get("of") == hash_of_images(one)}
        return in_usual_order(lost | {m for m, one in now.items() if _was_refused(one, manifest)})

    def _whys(self, manifest: Mapping[str, Any], case: str) -> Mapping[str, str]:
        """Each series of a case → why it is taken or not; none where a finished one was made of another study's."""
        whys = {hash_of_images(series): series.why for series in (self.series or {}).get(case, ())}
        another = whys.keys().isdisjoint(entry.get("of") for entry in _taken_before(manifest).values())
        return {} if another else whys

    def convert(self, case: str, place: Path, *, keep_names: bool = False) -> tuple[StudyFiles, Scans]:
        """A study of DICOM as NIfTI in PLACE/CASE; without files where `refused` says why it is not."""
        scans = convert_case(case, (self.series or {})[case], place, keep_names=keep_names)
        if scans.refused:
            return StudyFiles(case, case, {}, (), ()), scans
        paths = [place / case / f"{case}-{modality}.nii.gz" for modality in scans.series]
        (files,) = (files for files in recognise(paths, root=place) if files.case == case)
        return files, scans


def _taken_before(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Contrast → the series that a finished case was completed from."""
    taken: Mapping[str, Any] = manifest.get("series", {}).get("taken", {})
    return taken


def _was_refused(series: Series, manifest: Mapping[str, Any]) -> bool:
    """Whether a finished case had a series of this name left out by what a person chose."""
    left_out, name = manifest.get("series", {}).get("left_out", {}), re.escape(series.name)
    return any(is_of_person(why) and re.fullmatch(rf"{name}( \(\d+\))?", other) for other, why in left_out.items())


@listed_once()
def find_inputs(
    paths: Sequence[Path],
    mapping: Mapping[str, str] | None = None,
    *,
    keep_names: bool = False,
    exclude: Path | None = None,
    display: Display = SILENT,
) -> Inputs:
    """The studies in folders, or the one study that several files are; see `find_studies`, `study_of`, `find_cases`.

    Raises:
        NamingError: no study. ConfigError: files and folders together, DICOM and NIfTI together, or one name twice.
    """
    files = [path for path in paths if os.path.isfile(path)]
    if files and len(files) < len(paths):
        raise ConfigError("Give files, which make one study, or folders, but not both.")
    if files:
        studies = _told_apart([study_of(files, mapping)], mapping, display)
        _say_unmatched(studies, mapping, display)
        return Inputs(files[0].absolute().parent, studies)
    root = paths[0] if len(paths) == 1 else _common(paths)
    dicom = [path for path in paths if holds_dicom(path, mapping, exclude=exclude, display=display)]
    if dicom and len(dicom) < len(paths):
        raise ConfigError(f"{dicom[0]} holds DICOM, and other folders do not. Complete them separately.")
    if dicom:
        cases: dict[str, list[Series]] = {}
        for path in paths:
            in_path = find_cases(path, mapping, keep_names=keep_names, exclude=exclude, display=display)
            for case, series in in_path.items():
                cases.setdefault(case, []).extend(series)
        return with_files_beside(Inputs(root, series=cases), paths, exclude, display)
    written = [exclude] if exclude and (records_of(exclude) / "manifest.json").exists() else []
    in_paths = [find_studies(path, mapping, written) for path in paths]
    studies = [study for found in in_paths for study in found]
    if repeated := sorted(name for name, n in Counter(study.case for study in studies).items() if n > 1):
        raise ConfigError(f"The folders share study names ({', '.join(repeated[:3])}). Complete them separately.")
    _say_unmatched(studies, mapping, display)
    studies = _told_apart(studies, mapping, display)
    nearby, series_nearby = dict[str, list[Path]](), dict[str, list[Unread]]()
    by_name = {study.case: study for study in studies}
    for path, found in zip(paths, in_paths, strict=True):
        own = [by_name[study.case] for study in found]
        beside = files_beside(path, own, exclude)
        for file in (file for file in beside.pop("", ()) if possible_contrasts(file.name)):
            display.say(f"{file} belongs to no study that was found: it {why_unread(file)}.")
        nearby |= beside
        series_nearby |= dicom_beside(path, own, mapping, exclude)
    return Inputs(root, studies, beside=nearby, dicom=series_nearby)


def _common(paths: Sequence[Path]) -> Path:
    """The folder that holds all of them; the first one where they lie on several drives."""
    try:
        return Path(os.path.commonpath([path.absolute() for path in paths]))
    except ValueError:
        return paths[0].absolute()


def with_files_beside(inputs: Inputs, paths: Sequence[Path], exclude: Path | None, display: Display) -> Inputs:
    """Inputs of DICOM with the files by its images that are not read, which are said."""
    made = [_as_files(case, all_series) for case, all_series in (inputs.series or {}).items()]
    beside = {case: found for path in paths for case, found in files_beside(path, made, exclude, nifti=True).items()}
    for file in (file for files_of_case in beside.values() for file in files_of_case):
        if possible_contrasts(file.name):
            display.say(f"{file.name} lies beside the DICOM, and is not read.")
    return replace(inputs, beside=beside)


def _told_apart(studies: Sequence[StudyFiles], mapping: Mapping[str, str] | None, display: Display) -> list[StudyFiles]:
    """The studies, those of several T1 and no T1ce by their names as their voxels say, unless a mapping says it."""
    by_user = {mapping_key(key) for key in mapping or {}} & {"t1n", "t1c"}
    doubtful = [study for study in studies if not by_user and doubtful_files(study)]
    told: dict[str, StudyFiles] = {}
    if doubtful:
        with display.task("compare T1", len(doubtful)) as task:
            for study in doubtful:
                told[study.case] = tell_apart(study)
                task.advance(study.case)
        for study in told.values():
            for note in study.notes:
                display.say(f"{study.case}: {note}")
    return [told.get(study.case, study) for study in studies]


def _as_files(case: str, all_series: Sequence[Series]) -> StudyFiles:
    """A study of DICOM as one of files, to see what lies by them."""
    images = tuple(image.path for series in own_series(all_series) for image in series.images)
    return StudyFiles(case, case, {"": images}, (), ())


def _say_unmatched(studies: Sequence[StudyFiles], mapping: Mapping[str, str] | None, display: Display) -> None:
    for text in unmatched(studies, mapping):
        display.say(f"warning: {text}")


def lacking(acquired: Sequence[str], model: CrossConditionedModel) -> list[str]:
    """The contrasts of a complete study, and the model's targets, that were not acquired.

    A model of contrasts of one's own says by itself what a complete study has.
    """
    usual = EXPECTED if {*model.config.modalities} <= {*EXPECTED} else ()
    return [m for m in dict.fromkeys((*usual, *model.config.targets)) if m not in acquired]


def what_to_fill(
    acquired: Sequence[str], model: CrossConditionedModel, settings: InferenceSettings, unread: Sequence[Unread] = ()
) -> tuple[list[str], dict[str, str]]:
    """Which targets to synthesise, and for every other gap the reason why not.

    What `unread` may be, and what no training patient had together with the sources, is not synthesised, unless
    settings.targets names it.
    """
    config, missing, asked = model.config, lacking(acquired, model), settings.targets is not None
    doubts = {} if asked else reasons(unread, missing)
    if settings.targets is not None:
        missing = [m for m in missing if m in settings.targets]
    absent = [source for source in config.sources if source not in acquired]
    enough = not absent or (config.any_subset and len(absent) < len(config.sources))
    requested, not_filled = [], {}
    for modality in missing:
        if modality in doubts:
            not_filled[modality] = doubts[modality]
        elif modality not in config.targets:
            not_filled[modality] = f"the model was trained for {', '.join(config.targets)} only"
        elif (
            enough and not asked and not _learnt_together(model, [m for m in config.sources if m in acquired], modality)
        ):
            together = ", ".join(m for m in config.sources if m in acquired)
            not_filled[modality] = despite(f"no training patient had {modality} together with {together}.", modality)
        elif not enough and config.any_subset:
            not_filled[modality] = f"the model needs any of {', '.join(config.sources)}, and none is there"
        elif not enough:
            not_filled[modality] = f"the model needs {', '.join(config.sources)}, and {', '.join(absent)} is missing"
        else:
            requested.append(modality)
    return requested, not_filled


def _learnt_together(model: CrossConditionedModel, sources: Sequence[str], target: str) -> bool:
    """Whether any training patient had a target and these sources, as far as the model says which they had."""
    if not model.config.any_subset or "present" not in model.baselines:
        return True
    return bool(together(model.baselines, [model.config.modalities.index(m) for m in (*sources, target)]).any())


@dataclass(frozen=True)
class PlannedCase:
    """What would become of one study."""

    case: str
    acquired: Mapping[str, str] = field(default_factory=dict)
    """Contrast → its file, or its series and the tags by which it was recognised."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """File or series → why it is not used."""
    synthesise: Sequence[str] = ()
    """Contrasts that would be synthesised."""
    not_synthesised: Mapping[str, str] = field(default_factory=dict)
    """Contrast → why it would stay missing."""
    unread: Sequence[str] = ()
    """Those of them that a file or a series may be which is not used."""
    failed: str = ""
    """Why nothing can be done with the study, as far as names, tags and what lies in OUT say."""
    finished: bool = False
    """Whether it was finished before, and would be skipped."""
    again: str = ""
    """Why it would be done again, of a study that was finished before."""
    described: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Contrast, '' for none → how its series of DICOM are described; not for sharing."""

    @property
    def outcome(self) -> str:
        """What would become of it, in the words of a summary."""
        if self.failed:
            return "would fail"
        if self.finished:
            return "finished before"
        if self.synthesise:
            return "to be synthesised"
        return "not to be synthesised" if self.not_synthesised else "nothing to synthesise"

    def lines(self) -> list[str]:
        """What a user reads of it."""
        said = [f"{modality} is {what}" for modality, what in self.acquired.items()]
        said += [f"{name} excluded: {why}" for name, why in self.excluded.items()]
        said += [f"finished before, and would be done again: {self.again}"] if self.again else []
        if self.synthesise and not self.finished:
            said.append(f"would synthesise {', '.join(self.synthesise)} from {', '.join(self.acquired)}")
        said += [f"{modality} not synthesised: {why}" for modality, why in self.not_synthesised.items()]
        return [f"{self.case}: {line}" for line in said]


def plan(
    inputs: Inputs,
    layout: Layout,
    model: CrossConditionedModel,
    settings: InferenceSettings,
    *,
    overwrite: bool = False,
) -> list[PlannedCase]:
    """What `complete_cohort` would do; voxels are not checked, so a study may still be refused for what it holds."""
    planned = []
    for files, found in _found(inputs):
        acquired = [*found["acquired"]]
        unread = inputs.unread(files, acquired, model)
        requested, gaps = what_to_fill(acquired, model, settings, unread)
        finished = not overwrite and (layout.folder(files.case) / "manifest.json").exists()
        fault, again = inputs.faults.get(files.case, ""), ""
        if not fault and finished and not found["failed"]:
            again, fault = _again(files, found["acquired"], inputs, layout, model, settings)
            finished = not again
        if not fault and not finished and not found["failed"] and inputs.series is None:
            fault = _refused_by_headers(files, layout, settings)
        if fault:
            found["failed"] = fault
        if found["failed"]:
            requested, gaps = [], {}
        doubtful = [m for m in gaps if settings.targets is None and any(m in one.may_be for one in unread)]
        found |= {"synthesise": requested, "not_synthesised": gaps, "unread": doubtful}
        planned.append(PlannedCase(files.case, finished=finished, again=again, **found))
    return planned


def _refused_by_headers(files: StudyFiles, layout: Layout, settings: InferenceSettings) -> str:
    """Why a study is refused by what its headers say; '' where it is not."""
    try:
        if (reference := check_headers(files, settings.register)) is not None:
            layout.check(files.case, reference)
    except CrossmrError as error:
        return str(error)
    return ""


def _again(
    files: StudyFiles,
    acquired: Mapping[str, str],
    inputs: Inputs,
    layout: Layout,
    model: CrossConditionedModel,
    settings: InferenceSettings,
) -> tuple[str, str]:
    """Why a finished case would be done again, and why it would fail, as it was made of other scans; '' if not."""
    manifest = read_json(layout.folder(files.case) / "manifest.json", OutputError)
    if undone := inputs.undone(manifest, files.case):
        return "", why_not_undone(files.case, undone)
    if inputs.series is None:
        now = _now_of_files(manifest, files, inputs, layout, model, settings)
    else:
        others = other_series(files.case, inputs.series[files.case], layout.records / SCANS)
        come = {m: name for m, name in acquired.items() if m in manifest.get("synthetic", {})}
        now = _now(manifest, [*acquired], files, inputs, layout, model, settings, others, come)
    why = redo_reason(manifest, now)
    return why, why_not_kept(files.case, now.others) if now.others and not why else ""


def redo_reason_of_files(
    manifest: Mapping[str, Any],
    files: StudyFiles,
    inputs: Inputs,
    layout: Layout,
    model: CrossConditionedModel,
    settings: InferenceSettings,
) -> str:
    """Why a case of files that was finished before is completed again; empty where it stays as it is."""
    return redo_reason(manifest, _now_of_files(manifest, files, inputs, layout, model, settings))


def _now_of_files(
    manifest: Mapping[str, Any],
    files: StudyFiles,
    inputs: Inputs,
    layout: Layout,
    model: CrossConditionedModel,
    settings: InferenceSettings,
) -> Now:
    images = files.images()
    come = {m: images[m].name for m in arrived(manifest, images)}
    return _now(manifest, [*images], files, inputs, layout, model, settings, other_scans(manifest, images), come)


def _now(
    manifest: Mapping[str, Any],
    acquired: Sequence[str],
    files: StudyFiles,
    inputs: Inputs,
    layout: Layout,
    model: CrossConditionedModel,
    settings: InferenceSettings,
    others: Sequence[str],
    come: Mapping[str, str],
) -> Now:
    """What there is of a finished case, files included that are not read."""
    known = [m for m in acquired if m in manifest.get("acquired", ()) or m in come]
    unread = [] if settings.targets is not None else inputs.unread(files, known, model)
    may_be = {m: one.name for one in unread for m in sorted(one.may_be)}
    come = {**come, **{m: name for m, name in may_be.items() if m in manifest.get("synthetic", {})}}
    what = {"model_sha256": model.record.get("sha256"), "register": settings.register}
    gone, chosen = layout.gone(files.case, manifest), inputs.chosen_since(manifest, files.case)
    return Now(acquired, others, come, [*may_be], gone, settings.targets, model.config.targets, what, chosen)


def _found(inputs: Inputs) -> list[tuple[StudyFiles, dict[str, Any]]]:
    """Each study's files, and what was recognised of it, as fields of `PlannedCase`."""
    found: list[tuple[StudyFiles, dict[str, Any]]] = []
    for case, all_series in (inputs.series or {}).items():
        chosen, excluded, _ = choose(all_series)
        acquired = {modality: f"{series.name} ({series.why})" for modality, series in chosen.items()}
        failed = "" if chosen else "none of its series is a contrast that crossmr knows"
        described: dict[str, list[str]] = {}
        for series in all_series:
            modality = next((m for m, one in chosen.items() if one is series), "")
            described.setdefault(modality, []).append(series.acquisition.description)
        what = {"acquired": acquired, "excluded": excluded, "failed": failed, "described": described}
        found.append((_as_files(case, all_series), what))
    for files in inputs.studies:
        excluded = {path.name: "its name says no contrast" for path in files.unrecognised}
        excluded |= {path.name: why_passed_over(path) for path in files.passed_over}
        try:
            acquired = {modality: path.name for modality, path in files.images().items()}
            fault = "" if acquired else "the names of its files say no contrast"
        except NamingError as error:
            acquired, fault = {}, str(error)
        found.append((files, {"acquired": acquired, "excluded": excluded, "failed": fault}))
    return found
