"""The studies of an evaluation: how each is read, and which of its modalities are hidden."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.head import Normalisation
from crossmr.data.labels import ENHANCING
from crossmr.data.naming import StudyFiles, find_studies
from crossmr.data.patients import assign, read_patients
from crossmr.data.registration import RegistrationMode
from crossmr.data.study import Study, StudyMemory, load_study, study_memory
from crossmr.data.volume import Volume, voxels_sha256
from crossmr.device import ends_the_run
from crossmr.display import Display
from crossmr.errors import ConfigError, CrossmrError, StudyError
from crossmr.networks.model import ModelConfig

SPLIT = "test"
"""Of a prepared dataset, unless another one is asked for."""
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Subject:
    """One study as it is measured: head-cropped volumes (Z, Y, X) in [0, 1], and masks of their shape."""

    name: str
    patient: str
    volumes: Mapping[str, Array]
    air: Mapping[str, float]
    """Modality → where air lies on the [0, 1] scale; below 0 where it is darker than the scale's end."""
    head: Mask
    tumour: Mask
    """The lesion, every label of it."""
    enhancing: Mask
    """Its enhancing part: labels from ENHANCING on."""
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of (Z, Y, X)."""
    scans: tuple[str, ...] = ()
    """SHA-256 of the voxels of each volume as it was acquired."""
    corner: tuple[int, int, int] = (0, 0, 0)
    """Voxel (Z, Y, X) of the whole scan at which the volumes begin."""
    grid: tuple[int, int, int] = (1, 1, 1)
    """Voxels of the whole scan, (Z, Y, X)."""
    notes: tuple[str, ...] = ()
    """What is to be known of how its files were read; of a prepared dataset `prepare` has said it."""
    normalisation: Mapping[str, Normalisation] = field(default_factory=dict)
    """Modality → how its intensities became [0, 1]."""
    whole: Volume | None = None
    """The grid of the whole scan, every voxel 0; None of a prepared dataset, which does not keep its place."""

    def head_of(self, modality: str) -> Mask:
        """What one volume has of the head: it may lack slices, or be without the skull that others have."""
        has: Mask = self.head & (self.volumes[modality] > 0)
        return has


class FoundSubject(NamedTuple):
    """A study that is to be measured."""

    name: str
    read: Callable[[], Subject]
    paths: Sequence[Path]
    """Its files and folders, as an error may name them."""
    modalities: Callable[[], Sequence[str]]
    """What it has, by the names of its files; raises NamingError where two have one modality."""
    memory: Callable[[], StudyMemory]
    """What it takes, by the headers of its files."""
    study: Callable[[], Study] | None = None
    """Reads it with its own intensities and grid; None of a prepared set, which keeps neither."""


def open_prepared(data: Path) -> PreparedDataset | None:
    """The prepared dataset that a folder is, or None."""
    return PreparedDataset(data) if (data / "manifest.json").exists() and (data / "cases").exists() else None


def find_subjects(
    data: Path,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    register: RegistrationMode = "never",
    patients: Path | None = None,
    say: Callable[[str], object] | None = None,
) -> list[FoundSubject]:
    """Each study, not yet read: those of a prepared dataset's split, or all of a folder of studies.

    `split`, SPLIT unless given, is of a prepared dataset; `mapping`, `register` and `patients`, a table (see
    `read_patients`), are of a folder of studies. `say` is told of lines of the table without a study; without it they
    are refused.

    Raises:
        ConfigError: no such split, a table of patients that is wrong, or what is of the other kind of folder.
            NamingError: the folder holds no study.
    """
    dataset = open_prepared(data)
    if dataset is not None:
        of_folders = {"--patients": patients is not None, "--map": bool(mapping), "--register": register != "never"}
        if given := [option for option, there in of_folders.items() if there]:
            raise ConfigError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for a folder of studies: a prepared set "
                "knows whose its studies are and what they hold."
            )
        return [_found_case(case) for case in dataset.split(split or SPLIT)]
    if split is not None:
        raise ConfigError(f"--split is for a prepared set: of {data}, a folder of studies, all are measured.")
    studies = find_studies(data, mapping)
    if patients is not None:
        studies = assign(studies, read_patients(patients), patients, say)
    return [_found_files(files, register) for files in studies]


def _found_case(case: Case) -> FoundSubject:
    memory = StudyMemory(case.shape[::-1], head=1.0)  # it is cropped, and its arrays stay on the disk
    return FoundSubject(
        case.name, partial(subject_of_case, case), [case.folder], lambda: case.modalities, lambda: memory
    )


def _found_files(files: StudyFiles, register: RegistrationMode) -> FoundSubject:
    return FoundSubject(
        files.case,
        partial(subject_of_files, files, register),
        files.paths(),
        lambda: tuple(files.images()),
        lambda: study_memory(files.images(), register),
        partial(load_study, files, register=register),
    )


def subject_of_case(case: Case) -> Subject:
    """Read a study of a prepared dataset."""
    head, labels = np.moveaxis(np.asarray(case.masks()), 1, 0)
    return Subject(
        name=case.name,
        patient=case.patient,
        volumes={modality: case.volume(modality) for modality in case.modalities},
        air=case.air,
        normalisation=case.normalisation,
        head=head > 0,
        tumour=labels > 0,
        enhancing=labels >= ENHANCING,
        spacing_mm=case.spacing_mm,
        scans=case.scans,
        corner=case.corner,
        grid=case.grid,
    )


def subject_of_files(files: StudyFiles, register: RegistrationMode = "never") -> Subject:
    """Read a study of NIfTI files, and crop it to the head."""
    return subject_of_study(load_study(files, register=register))


def subject_of_study(study: Study) -> Subject:
    """Crop a study to the head."""
    box = study.box()
    head = study.mask[box]
    labels = np.zeros_like(head, np.uint8) if study.labels is None else study.labels[box]
    return Subject(
        name=study.case,
        patient=study.patient,
        volumes={m: np.ascontiguousarray(study.normalised(m, box)) for m in study.volumes},
        air={m: normalisation.air_level for m, normalisation in study.normalisation.items()},
        normalisation=study.normalisation,
        head=head,
        tumour=labels > 0,
        enhancing=labels >= ENHANCING,
        spacing_mm=study.reference.spacing_mm,
        scans=tuple(voxels_sha256(volume) for volume in study.volumes.values()),
        corner=(box[0].start, box[1].start, box[2].start),
        grid=(study.mask.shape[0], study.mask.shape[1], study.mask.shape[2]),
        notes=tuple(study.notes),
        whole=replace(study.reference, data=np.broadcast_to(np.float32(0), study.mask.shape)),
    )


def each_study(
    subjects: Sequence[FoundSubject], measure: Callable[[FoundSubject], T], display: Display
) -> Iterator[tuple[str, T | None, str]]:
    """Measure one study after the other: its name, what `measure` returned, and else why it failed.

    After an error of the device or of memory no further one is tried.
    """
    with display.task("evaluate", len(subjects)) as task:
        for number, found in enumerate(subjects, 1):
            try:
                yield found.name, measure(found), ""
            except CrossmrError as error:
                yield found.name, None, str(error)
            except Exception as error:  # nobody foresaw it: the other patients go on all the same
                yield found.name, None, f"{found.name}: {display.unforeseen(error)}"
                if reason := ends_the_run(error):
                    for one in subjects[number:]:
                        yield one.name, None, f"{one.name}: not tried, because {reason}"
                    return
            task.advance(found.name)


def patterns(config: ModelConfig, subject: Subject, *, every_subset: bool = False) -> list[tuple[str, ...]]:
    """Which sources the model is given of a study; what else the study has is hidden.

    The model's own sources. Of a model of any subset: all modalities but one, each in turn, or every subset.

    Raises:
        StudyError: the study lacks a source, or has no target to compare with.
    """
    acquired = [m for m in config.modalities if m in subject.volumes]
    if config.any_subset:
        if len(acquired) < 2:
            raise StudyError(f"{subject.name}: cannot be measured: it has not two of {', '.join(config.modalities)}.")
        sizes = range(1, len(acquired)) if every_subset else [len(acquired) - 1]
        return [sources for size in sizes for sources in itertools.combinations(acquired, size)]
    missing = [source for source in config.sources if source not in acquired]
    if missing or not set(config.targets) & set(acquired):
        what = f"it lacks {', '.join(missing)}" if missing else f"it has none of {', '.join(config.targets)}"
        raise StudyError(f"{subject.name}: cannot be measured: {what}.")
    return [config.sources]
