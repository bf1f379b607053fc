"""A completed cohort as an nnU-Net dataset: each case has all channels, acquired or synthetic.

DATASET/
├── imagesTr/CASE_0000.nii.gz   a file per channel, in the order of dataset.json; imagesTs for cases without labels
├── labelsTr/CASE.nii.gz        segmentations of cases that have one
├── dataset.json                channels and labels, as nnU-Net 2 reads them
└── crossmr.json                which channels of which case are synthetic
"""

import gzip
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.completion.layout import records_of
from crossmr.completion.ownership import other_scans
from crossmr.data.formats import is_nifti
from crossmr.data.labels import cavity_is_labelled
from crossmr.data.naming import StudyFiles, display_name, find_studies, in_usual_order, modality_names
from crossmr.data.nifti import is_synthetic, write_volume
from crossmr.data.volume import describe_grid, on_grid, read_labels, read_volume, same_grid
from crossmr.errors import CrossmrError, OutputError, StudyError, names_only
from crossmr.files import LOCK, locked, read_json, write_atomically, write_json

ENHANCING = {4: 3}
"""BraTS' label of enhancing tumour from 2016 to 2021 → since 2023; nnU-Net needs labels without gaps."""

Channels = dict[str, tuple[Path, bool]]
"""Modality → its file, and whether that is synthetic."""


def export_nnunet(
    cohort: Path,
    completed: Path,
    out: Path,
    *,
    modalities: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a dataset for nnU-Net 2; returns the record that crossmr.json holds.

    Args:
        cohort: the folder that was completed.
        completed: what `complete` wrote.
        out: the dataset's folder, such as nnUNet_raw/Dataset501_Completed; new or empty.
        modalities: the channels, in order; by default all that any case has.
        mapping: see `find_studies`.

    Raises:
        OutputError: OUT is not empty, or cannot be written. NamingError: no study. StudyError: no case is complete.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise OutputError(f"{out} is a file; name another folder.")
    with locked(out):
        if {path.name for path in out.iterdir()} - {LOCK}:
            raise OutputError(f"{out} is not empty; name another folder.")
        studies = {files.case: files for files in find_studies(cohort, mapping)}
        cases, left_out = _find_cases(studies, records_of(completed))
        record = _write_dataset(cohort, out, cases, left_out, modalities)
        common = [cohort, completed, out]
        shareable = {case: names_only(why, [*studies[case].paths(), *common]) for case, why in left_out.items()}
        write_json(out / "crossmr.json", {**record, "left_out": shareable})
        return record


def _write_dataset(
    cohort: Path,
    out: Path,
    cases: Mapping[str, tuple[Channels, Path | None]],
    left_out: dict[str, str],
    modalities: Sequence[str] | None,
) -> dict[str, Any]:
    """Write the cases, then dataset.json; returns the record, and adds to `left_out`."""
    chosen = list(
        modality_names(modalities) if modalities else in_usual_order({m for own, _ in cases.values() for m in own})
    )
    synthetic: dict[str, list[str]] = {}
    values: set[int] = set()
    gap = _lacks_three([(case, label) for case, (_, label) in cases.items() if label is not None])
    for case, (channels, label) in cases.items():
        if lacking := [m for m in chosen if m not in channels]:
            left_out[case] = f"it lacks {', '.join(lacking)}; complete it first, or choose --modalities"
            continue
        try:
            renumbered = ENHANCING if gap and not cavity_is_labelled(case) else {}
            values |= _write_case(out, case, [channels[m][0] for m in chosen], label, renumbered)
        except CrossmrError as error:
            left_out[case] = str(error)
            continue
        synthetic[case] = [m for m in chosen if channels[m][1]]
    if not synthetic:
        what = f"has all of {', '.join(chosen)}" if chosen else "can be written"
        raise StudyError(f"No case of {cohort} {what}: {next(iter(left_out.values()), 'it has none')}")
    write_json(
        out / "dataset.json",
        {
            "channel_names": {str(n): display_name(m) for n, m in enumerate(chosen)},
            "labels": {"background": 0, **{f"label {v}": v for v in range(1, max(values, default=0) + 1)}},
            "numTraining": sum(cases[case][1] is not None for case in synthetic),
            "file_ending": ".nii.gz",
        },
    )
    return {"channels": chosen, "synthetic": synthetic, "left_out": left_out}


def _find_cases(
    studies: Mapping[str, StudyFiles], records: Path
) -> tuple[dict[str, tuple[Channels, Path | None]], dict[str, str]]:
    """Case → its channels and its segmentation, if any; and case → why it is left out."""
    cases: dict[str, tuple[Channels, Path | None]] = {}
    left_out: dict[str, str] = {}
    for case, files in studies.items():
        try:
            cases[case] = _channels(files, records), files.label()
        except CrossmrError as error:
            left_out[case] = str(error)
    return cases, left_out


def _channels(files: StudyFiles, records: Path) -> Channels:
    """The channels of a case: acquired, and where it lacks one, synthetic.

    Raises:
        CrossmrError: its files' names contradict each other, its manifest is not crossmr's, or what was synthesised is
            of other scans.
    """
    channels = {modality: (path, is_synthetic(path)) for modality, path in files.images().items()}
    folder = records / files.case
    if (path := folder / "manifest.json").exists():
        manifest = read_json(path, OutputError)
        if "synthetic" not in manifest:
            raise OutputError(f"{path} is not crossmr's. Name the folder that 'crossmr complete' wrote.")
        if others := other_scans(manifest, {m: path for m, (path, synthetic) in channels.items() if not synthetic}):
            raise StudyError(
                f"{folder} was made of other scans of this name ({', '.join(others)}), which may be another patient's. "
                "Complete these."
            )
        for modality, record in manifest["synthetic"].items():
            if channels.get(modality, (None, True))[1]:
                channels[modality] = folder / record["file"], True
    return channels


def _lacks_three(labels: Sequence[tuple[str, Path]]) -> bool:
    """Whether no label of the cases is 3, but for those in whose names 4 is a cavity; see `data.labels`."""
    for case, label in labels:
        with suppress(CrossmrError):  # which is said when the case is written
            if not cavity_is_labelled(case) and (read_volume(label).data == 3).any():
                return False
    return True


def _write_case(
    out: Path, case: str, paths: Sequence[Path], label: Path | None, renumbered: Mapping[int, int]
) -> set[int]:
    """Write a case's channels and labels, all or none; returns the values of its labels."""
    split = "Ts" if label is None else "Tr"
    targets = [out / f"images{split}" / f"{case}_{number:04d}.nii.gz" for number in range(len(paths))]
    values: set[int] = set()
    volumes = [read_volume(path) for path in paths]
    reference = volumes[0]
    for other in volumes[1:]:
        if not same_grid(other, reference):
            raise StudyError(
                f"{case}: {other.name} is {describe_grid(other)}, but {reference.name} is {describe_grid(reference)}, "
                "or they lie elsewhere. Register and resample them to one grid first."
            )
    try:
        if label is not None:
            segmentation = read_labels(label, reference)
            for old, new in renumbered.items():
                segmentation = np.where(segmentation == old, np.uint8(new), segmentation)
            values = {int(value) for value in np.unique(segmentation)}
            targets.append(out / "labelsTr" / f"{case}.nii.gz")
            write_volume(on_grid(segmentation, reference, description="labels", dtype=np.uint8), targets[-1])
        for path, volume, target in zip(paths, volumes, targets, strict=False):
            if not is_nifti(path.name):
                write_volume(on_grid(volume.data, volume, description="acquired"), target)
            elif path.name.lower().endswith(".gz"):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            else:
                write_atomically(target, gzip.compress(path.read_bytes(), 6, mtime=0))
    except BaseException as error:
        for target in targets:
            target.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{out} could not be written: {error.strerror or error}.") from error
        raise
    return values
