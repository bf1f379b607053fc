"""One case of a cohort: whether it is finished, completed, written with its pictures, and kept as it is."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.completion.inputs import Inputs, redo_reason_of_files
from crossmr.completion.layout import PICTURES, Layout, Profile, bids_name
from crossmr.completion.ownership import check_case, earlier_files, other_scans, why_not_kept
from crossmr.completion.study import (
    Completed,
    Origin,
    Reference,
    complete_study,
    settings_record,
)
from crossmr.completion.work import Work
from crossmr.completion.writing import whole_or_absent, write_volumes
from crossmr.config import read_text
from crossmr.data.naming import DISPLAY_NAMES, StudyFiles, display_name
from crossmr.data.nifti import is_synthetic
from crossmr.data.study import Study, load_study
from crossmr.data.volume import read_volume
from crossmr.dicom.convert import Scans, hash_of_images
from crossmr.display import Display
from crossmr.errors import NamingError, OutputError, StudyError, names_only
from crossmr.files import read_json, remove, write_json
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import CrossConditionedModel
from crossmr.parts import Claim, Part
from crossmr.picture import Array, Kind, Panel, middle, save_panels


@dataclass(frozen=True)
class CohortSettings:
    """What is read of a folder of studies, and how the output is laid out."""

    mapping: Mapping[str, str] | None = None
    """Modality → pattern of file names, or, of DICOM, of series descriptions."""
    overwrite: bool = False
    """Whether finished cases are completed again."""
    profile: Profile = "labelled"
    """How OUT is laid out; see layout.py."""
    keep_names: bool = False
    """Whether cases of DICOM are called by patient ID and date, rather than by hashes."""
    part: Part | None = None
    """Which part of the cohort, where several processes share it, and OUT; None for all of it, and OUT alone."""
    retry_failed: bool = False
    """With a part: whether to try again what failed before in this run."""
    share: bool = False
    """Whether other calls may complete other studies into OUT at the same time; `finish_cohort` sums all up."""
    series_table: Path | None = None
    """A table of the series of DICOM, in which a person has said which are which contrast; `plan_cohort` writes it."""

    def __post_init__(self) -> None:
        read_text(self, "part", Part | None, Part.parse, "3/100")


@dataclass(frozen=True, eq=False)
class Run:
    """What all cases of one call share."""

    inputs: Inputs
    layout: Layout
    work: Work
    model: CrossConditionedModel
    settings: InferenceSettings
    options: CohortSettings
    reference: Reference | None
    display: Display

    @property
    def record(self) -> dict[str, Any]:
        """Everything that decides the voxels, for the manifests."""
        return settings_record(self.model, self.settings, self.reference)

    def without_folders(self, case: str, why: str) -> str:
        """Why a case failed, without the folders of its files."""
        files = self.inputs.by_case.get(case)
        return names_only(
            why, [*(files.paths() if files else ()), self.inputs.root, self.layout.out, self.layout.records]
        )


def images_of(files: StudyFiles) -> Mapping[str, Any]:
    """The study's images; none where two have one modality, which is said when they are read."""
    try:
        return files.images()
    except NamingError:
        return {}


def complete_case(
    run: Run, files: StudyFiles, study: Future[Study | None], scans: Scans | None, claim: Claim | None
) -> tuple[Mapping[str, Any], bool]:
    """Complete one case of a cohort and write it; returns its manifest, and whether it was finished before.

    Raises:
        ClaimLost: another process has taken it over. CrossmrError: it cannot be completed.
    """
    if (manifest := kept(run, files)) is not None:
        return manifest, True
    start = time.perf_counter()
    loaded = study.result() or read_case(run, files)
    run.layout.check(loaded.case, loaded.reference)
    origin = Origin.of(run.inputs, files, scans, loaded, run.model)
    result = complete_study(loaded, run.model, run.settings, origin, run.reference)
    if claim is not None:
        claim.check()
    with place_of_its_own(run, files.case):
        return write_case(run, files, loaded, result, scans, start), False


@contextmanager
def place_of_its_own(run: Run, case: str) -> Iterator[None]:
    """Within this no other process writes what BIDS calls as it calls this case, and nobody has before.

    Raises:
        StudyError: another case has that name in OUT.
    """
    name = bids_name(case) if run.layout.profile == "bids" else case
    claim = None if name == case else run.work.claims.wait_for(name)
    try:
        if why := run.layout.why_taken(case):
            raise StudyError(why)
        yield
    finally:
        if claim is not None:
            run.work.claims.give_back(claim)


def kept(run: Run, files: StudyFiles) -> Mapping[str, Any] | None:
    """The manifest of a case that was finished before and stays as it is; None of one that is to be completed."""
    if not is_finished(run, files.case):
        return None
    if why := redo_reason_of_case(run, files):
        run.display.say(f"{files.case}: finished before, and done again: {why}")
        return None
    return finished_before(run, files)


def read_case(run: Run, files: StudyFiles) -> Study:
    """The volumes of a case."""
    return load_study(files, register=run.settings.register, labels=False)


def write_case(
    run: Run, files: StudyFiles, study: Study, result: Completed, scans: Scans | None, start: float
) -> Mapping[str, Any]:
    """Write a completed case whole, in place of an earlier one, and return its manifest.

    `start` is by `time.perf_counter`, for the seconds that the case took.
    """
    manifest, path = dict(result.manifest), run.layout.folder(files.case) / "manifest.json"
    if files.passed_over:
        manifest["passed_over"] = sorted(other.name for other in files.passed_over)
    check_case(run.layout, files.case, run.model.config.targets, list(result.images), overwrite=True)
    earlier, picture = earlier_files(run.layout, files.case, run.model.config.targets), run.layout.picture(files.case)
    before = read_json(path, OutputError).get("synthetic", {}) if path.exists() else {}
    if lost := [m for m in before if m not in result.images and m not in manifest["acquired"]]:
        run.display.say(f"{files.case}: synthesised before, not made now, and deleted: {', '.join(lost)}")
    with whole_or_absent(path.parent) as written:
        for old in (path, picture, *earlier):
            remove(old)
        write_volumes(run.layout, result.images, result.stds, manifest, written)
        if scans is not None:
            _write_dicom(run, study, scans, result, manifest, written)
        inputs = [image for modality, image in files.images().items() if modality in manifest["acquired"]]
        written += run.layout.finish(files.case, manifest, run.inputs.root, inputs)
        if shown := _panels(study, result):
            panels = save_panels(picture, shown, study.reference.spacing_mm, DISPLAY_NAMES)
            manifest["picture"] = {"file": f"{PICTURES}/{picture.name}", "panels": panels}
            written.append(picture)
        manifest["seconds"] = round(time.perf_counter() - start, 3)
        write_json(path, manifest)
    return manifest


def is_finished(run: Run, case: str) -> bool:
    """Whether a case was finished before, and is not to be overwritten; what this run finished never is."""
    path = run.layout.folder(case) / "manifest.json"
    return run.work.is_of_this_run(path) if run.options.overwrite else path.exists()


def redo_reason_of_case(run: Run, files: StudyFiles) -> str:
    """Why a case that was finished before is completed again; empty where it stays as it is."""
    manifest = read_json(run.layout.folder(files.case) / "manifest.json", OutputError)
    return redo_reason_of_files(manifest, files, run.inputs, run.layout, run.model, run.settings)


def finished_before(run: Run, files: StudyFiles) -> Mapping[str, Any]:
    """The manifest of a case that is kept as it is, after saying what has changed since.

    Raises:
        StudyError: it was completed from other scans.
    """
    path, images = run.layout.folder(files.case) / "manifest.json", files.images()
    manifest = read_json(path, OutputError)
    if changed := other_scans(manifest, images):
        raise StudyError(why_not_kept(files.case, changed))
    if manifest.pop("paths", None) is not None:  # earlier versions said where the scans lie
        write_json(path, manifest)
    given, changed = manifest.get("given", {}), ["other settings"] if manifest.get("settings") != run.record else []
    more = {m for m in {*images} - {*given} if not is_synthetic(images[m])}
    for what, those in (("more", more), ("fewer", {*given} - {*images})):
        changed += [f"{what} scans now ({', '.join(sorted(those))})"] if those else []
    if changed:
        what = " and ".join(changed)
        run.display.say(f"{files.case}: finished before with {what}, and kept; --overwrite does it again")
    return manifest


def _write_dicom(
    run: Run, study: Study, scans: Scans, result: Completed, manifest: dict[str, Any], written: list[Path]
) -> None:
    """Write each synthetic volume, and its standard deviation, as a derived series; name them like `write_volumes`."""
    from crossmr.dicom.write import DerivedSeries, choose_steps, write_derived

    manifest["series"] = {
        "taken": {
            m: {"series": series.number, "why": series.why, "of": hash_of_images(series)}
            for m, series in scans.series.items()
        },
        "left_out": dict(scans.left_out),
    }
    settings = " ".join(str(manifest["settings"][key]) for key in ("model_sha256", "guidance", "samples", "seed"))
    for modality, entry in manifest["synthetic"].items():
        sources = ", ".join(display_name(m) for m in entry["from"])
        for kind, image in (("", result.images[modality]), ("std", result.stds.get(modality))):
            if image is None:
                continue
            what = f"{'Standard deviation of the error of s' if kind else 'S'}ynthetic "
            what += f"{display_name(modality)} by crossmr {version('crossmr')} from {sources}."
            series = DerivedSeries(
                modality=modality,
                like=scans.series[next(iter(study.volumes))],
                sources={m: scans.series[m] for m in entry["from"]},
                description=f"{what} {' '.join(entry['warnings'])}",
                settings=settings,
                created=datetime.fromisoformat(manifest["created"]),
                kind=kind,
                steps=None if entry["scale"] is None else choose_steps(read_volume(result.images[modality]).data),
            )
            folder = run.layout.dicom(study.case, modality, kind)
            written.append(write_derived(folder, read_volume(image).data, study.reference, series))
        entry["dicom"] = run.layout.dicom(study.case, modality).name


def _panels(study: Study, result: Completed) -> list[Panel]:
    """The acquired and the synthetic volumes, cut in three where there is most to see."""
    head, synthesis = result.head, result.synthesis
    if head is None or synthesis is None:
        return []
    mask = study.mask[study.box()]
    at = result.look_at or middle(mask)
    volumes: list[tuple[str, Kind, Array]] = [(m, "acquired", volume) for m, volume in head.volumes.items()]
    for index, modality in enumerate(synthesis.targets):
        volumes.append((modality, "synthetic", synthesis.images[index].numpy()))
        if synthesis.stds is not None:
            volumes.append((modality, "standard deviation", synthesis.stds[index].numpy()))
    return [Panel.of(modality, kind, np.where(mask, volume, np.float32(0)), at) for modality, kind, volume in volumes]
