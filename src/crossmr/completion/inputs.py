"""Which studies there are, and what would be synthesised of which: from names and tags alone, nothing is written."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossmr.completion.layout import Layout
from crossmr.completion.study import what_to_fill
from crossmr.data.naming import StudyFiles, find_studies, study_of, unmatched
from crossmr.dicom.convert import choose, find_cases
from crossmr.dicom.series import Series, holds_dicom
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, NamingError
from crossmr.networks.inference import Settings
from crossmr.networks.model import CrossConditionedModel


@dataclass(frozen=True, eq=False)
class Inputs:
    """The studies that a user named: of NIfTI, or of DICOM that is not converted yet."""

    root: Path
    """The folder that holds them all."""
    studies: Sequence[StudyFiles] = ()
    series: Mapping[str, Sequence[Series]] | None = None
    """Case → series of its study; None where the inputs are NIfTI."""


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
        studies = [study_of(files, mapping)]
        _say_unmatched(studies, mapping, display)
        return Inputs(files[0].absolute().parent, studies)
    root = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.absolute() for path in paths]))
    dicom = [path for path in paths if holds_dicom(path, mapping, exclude=exclude, display=display)]
    if dicom and len(dicom) < len(paths):
        raise ConfigError(f"{dicom[0]} holds DICOM, and other folders do not. Complete them separately.")
    if dicom:
        cases: dict[str, list[Series]] = {}
        for path in paths:
            for case, series in find_cases(path, mapping, keep_names=keep_names, exclude=exclude).items():
                cases.setdefault(case, []).extend(series)
        return Inputs(root, series=cases)
    studies = [study for path in paths for study in find_studies(path, mapping)]
    names = [study.case for study in studies]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"The folders share study names ({', '.join(repeated[:3])}). Complete them separately.")
    _say_unmatched(studies, mapping, display)
    return Inputs(root, studies)


def _say_unmatched(studies: Sequence[StudyFiles], mapping: Mapping[str, str] | None, display: Display) -> None:
    for text in unmatched(studies, mapping):
        display.say(f"warning: {text}")


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
    failed: str = ""
    """Why nothing can be done with the study, as far as names and tags say."""
    finished: bool = False
    """Whether it was finished before, and would be skipped."""

    @property
    def outcome(self) -> str:
        """What would become of it, in the words of a summary."""
        if self.failed:
            return "would fail"
        if self.finished:
            return "finished before"
        if self.synthesise:
            return "to be synthesised"
        return "not to be synthesised" if self.not_synthesised else "already complete"

    def lines(self) -> list[str]:
        """What a user reads of it."""
        said = [f"{modality} is {what}" for modality, what in self.acquired.items()]
        said += [f"{name} excluded: {why}" for name, why in self.excluded.items()]
        if self.synthesise and not self.finished:
            said.append(f"would synthesise {', '.join(self.synthesise)} from {', '.join(self.acquired)}")
        said += [f"{modality} not synthesised: {why}" for modality, why in self.not_synthesised.items()]
        return [f"{self.case}: {line}" for line in said]


def plan(
    inputs: Inputs, layout: Layout, model: CrossConditionedModel, settings: Settings, *, overwrite: bool = False
) -> list[PlannedCase]:
    """What `complete_cohort` would do; images are not opened, so a study may still be refused for what it holds."""
    planned = []
    for case, found in _found(inputs):
        requested, lacking = what_to_fill([*found["acquired"]], model, settings)
        finished = not overwrite and (layout.folder(case) / "manifest.json").exists()
        if found["failed"]:
            requested, lacking = [], {}
        planned.append(PlannedCase(case, synthesise=requested, not_synthesised=lacking, finished=finished, **found))
    return planned


def _found(inputs: Inputs) -> list[tuple[str, dict[str, Any]]]:
    """Case → what was recognised of it, as fields of `PlannedCase`."""
    found: list[tuple[str, dict[str, Any]]] = []
    for case, all_series in (inputs.series or {}).items():
        chosen, excluded, _ = choose(all_series)
        acquired = {modality: f"{series.name} ({series.why})" for modality, series in chosen.items()}
        failed = "" if chosen else "none of its series is a contrast that crossmr knows"
        found.append((case, {"acquired": acquired, "excluded": excluded, "failed": failed}))
    for files in inputs.studies:
        excluded = {path.name: "its name says no contrast" for path in files.unrecognised}
        try:
            acquired = {modality: path.name for modality, path in files.images().items()}
            fault = "" if acquired else "the names of its files say no contrast"
        except NamingError as error:
            acquired, fault = {}, str(error)
        found.append((files.case, {"acquired": acquired, "excluded": excluded, "failed": fault}))
    return found
