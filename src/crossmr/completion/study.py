"""Completing one study: missing contrasts are synthesised from the acquired ones, on its grid, labelled synthetic."""

import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crossmr import main_memory
from crossmr.completion.checks import Finding, check
from crossmr.completion.inputs import Inputs, find_inputs, what_to_fill
from crossmr.completion.layout import FORMAT, Layout
from crossmr.completion.lesions import Voxel, find_lesions, most_uncertain
from crossmr.completion.unread import Unread
from crossmr.completion.verdict import is_refusal, judge, refusals, undertrained, unlearnt, verdict_on
from crossmr.completion.writing import save_study
from crossmr.config import check_kind
from crossmr.data.formats import content_sha256, stamp
from crossmr.data.head import DARKEST, HIGHEST, LOWEST
from crossmr.data.naming import StudyFiles, display_name, find_studies, modality_name
from crossmr.data.study import Study, load_study, study_memory
from crossmr.data.volume import on_grid
from crossmr.device import choose_precision
from crossmr.dicom.convert import Scans
from crossmr.errors import ConfigError, NamingError, StudyError
from crossmr.files import temporary_folder
from crossmr.networks.inference import (
    HeadVolumes,
    InferenceSettings,
    Synthesis,
    check_settings,
    chosen_guidance,
    chosen_planes,
    passing_memory,
    samples_drawn,
    slices_at_once,
    synthesise,
)
from crossmr.networks.model import INHERITED, CrossConditionedModel, calibrated_on
from crossmr.picture import middle, window
from crossmr.registry import load_model

INTENSITY = {
    "range": [0, 1],
    "meaning": "1/3 is the median within the head, 1/15 one robust standard deviation (quartile range / 1.349); "
    "exactly 0 is outside the head; no MR unit",
}
LIKE = {"t1n": "t1c", "t1c": "t1n", "t2w": "t2f", "t2f": "t2w"}
LIKE_INPUT = {
    "range": None,
    "meaning": "median and robust standard deviation (quartile range / 1.349) within the head are those of the "
    "acquired volume that 'scale' names; (value - intercept) / slope is the [0, 1] scale, but for values that would "
    "be below 'least', and are that; exactly 0 is outside the head; no MR unit",
}
ENHANCEMENT = (
    "Contrast enhancement cannot in general be inferred from unenhanced images: "
    "absence or presence of enhancement in this synthetic T1ce is no finding."
)
DISCLAIMER = "Synthetic, for research use only; crossmr is not a medical device."
_DEVICE = threading.Lock()
"""Whoever synthesises: of several threads that complete studies, one at a time has the device and its memory."""


@dataclass(frozen=True, eq=False)
class Completed:
    """What became of one study."""

    images: Mapping[str, Any]
    """Modality → nibabel image on the reference's grid, float32 on settings.scale, its header marked SYNTHETIC."""
    stds: Mapping[str, Any]
    """Modality → how far each voxel may be off, a standard deviation on the image's scale; empty where the model has no
    network for it and draws one sample."""
    manifest: Mapping[str, Any]
    """Verdict and reasons, inputs with hashes, model, seed, guidance, scale, what could not be filled and why."""
    head: HeadVolumes | None = None
    """The sources as the networks read them; None where nothing was synthesised."""
    synthesis: Synthesis | None = None
    """The arrays that the images hold, cropped to the head."""
    look_at: Voxel | None = None
    """Where pictures and pages open, (Z, Y, X) of these arrays: the lesion, or where the standard deviation is largest;
    None where nothing was synthesised."""

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write what the command line writes of this study into FOLDER/CASE, and return that folder.

        CASE-t2f_synthetic.nii.gz for each image, float32 in [0, 1] on the study's grid, its header marked SYNTHETIC;
        CASE-t2f_std.nii.gz for each standard deviation, on the same scale; and, last, manifest.json. If anything fails,
        nothing of the study is left. One process at a time writes to a folder. Derived DICOM series, pictures and a
        report are written by `complete_cohort`.

        Args:
            folder: the output folder, of one study or of many; made where it is missing.
            overwrite: whether a study of this name that crossmr has written there is replaced.

        Raises:
            OutputError: a finished study of this name lies there; what would be replaced is an acquired scan, or not
                crossmr's; or the folder cannot be written.
        """
        layout = Layout(Path(folder))
        with layout.locked():
            return save_study(layout, self.images, self.stds, self.manifest, overwrite=overwrite)


@dataclass(frozen=True)
class Origin:
    """What is known of a study beside its volumes."""

    files: Mapping[str, Any] = field(default_factory=dict)
    """Modality → what the manifest says of its file."""
    unread: Sequence[Unread] = ()
    """What was not used, and may be a contrast that the study lacks."""
    stamps: Mapping[str, Any] = field(default_factory=dict)
    """Modality → size and time of its file."""
    doubts: Sequence[str] = ()
    """Why its contrasts may not be what they are taken for."""

    @classmethod
    def of(
        cls, inputs: Inputs, files: StudyFiles, scans: Scans | None, study: Study, model: CrossConditionedModel
    ) -> "Origin":
        """Of a study that was read from these files, which `scans` were converted to if it was DICOM."""
        images, unread = files.images(), inputs.unread(files, tuple(study.volumes), model)
        stamps = {m: stamp(image) for m, image in images.items()}  # before they are hashed: they may change meanwhile
        return cls(hashes(images), unread, stamps, files.notes if scans is None else scans.notes)


class Reference(NamedTuple):
    """Real scans that guide."""

    head: HeadVolumes
    """The volumes of the model's targets."""
    files: Mapping[str, Any]
    """File names and hashes, for the manifest."""


def complete(
    study: Path | str | Mapping[str, Any],
    model: CrossConditionedModel | Path | str | None = None,
    settings: InferenceSettings | None = None,
    *,
    targets: Sequence[str] | None = None,
    case: str = "study",
) -> Completed:
    """Synthesise what a study lacks and return it; nothing is written, see `Completed.save`.

    Args:
        study: the study's folder, of NIfTI or of DICOM, or modality → volume, in any usual spelling of the modalities:
            {"T1": "t1.nii.gz", "FLAIR": image}. A volume is the path of a NIfTI file, an image of nibabel, or a pair
            (array, affine): real numbers (X, Y, Z) of any unit, and the (4, 4) matrix from voxel indices to mm in RAS+,
            as nibabel has them. All lie on one grid, unless settings.register says otherwise.
        model: what `load_model` gave, for many studies; or a registered name, or a model's folder, which is then
            loaded; None for the default.
        settings: guidance, seed, device and so on; see `InferenceSettings`.
        targets: modalities requested, one ("t2f") or several ("T1ce,FLAIR"); None for those of the settings, by
            default all that are missing and the model knows.
        case: name of a study that is given volume by volume: it seeds a sample, and `Completed.save` writes under it.

    Returns:
        Images and standard deviations on the grid of the first volume (in the order T1, T1ce, T2, FLAIR), float32 in
        [0, 1], and a manifest. What could not be synthesised is missing, with the reason in manifest["not_filled"].

    Raises:
        CrossmrError: with one line that says what is wrong. NamingError, VolumeError, StudyError: the study.
            ModelError: the model. ConfigError: a setting, or a name that is not a modality.
    """
    settings = InferenceSettings() if settings is None else settings
    check_kind(settings, InferenceSettings)
    if targets is not None:
        settings = replace(settings, targets=targets)
    model = load_model(model, settings.device)
    reference = read_reference(settings, model)
    if isinstance(study, Mapping):
        images = _by_modality(study, model.config.modalities)
        check_memory(case, images, model, settings)
        loaded = load_study(images, case, register=settings.register)
        return complete_study(loaded, model, settings, Origin(hashes(images)), reference)
    inputs = find_inputs([Path(study)])
    if len(inputs.cases) != 1:
        raise NamingError(f"{study} holds {len(inputs.cases)} studies; name one of them, or use complete_cohort.")
    with contextlib.ExitStack() as stack:
        if inputs.series is None:
            (files,), scans = inputs.studies, None
        else:
            place = stack.enter_context(temporary_folder(f"{study} is converted"))
            files, scans = inputs.convert(inputs.cases[0], place)
            if scans.refused:
                raise StudyError(scans.refused)
            settings = registering(settings)
        check_memory(files.case, files.images(), model, settings)
        loaded = load_study(files, register=settings.register, labels=False)
        return complete_study(loaded, model, settings, Origin.of(inputs, files, scans, loaded, model), reference)


def registering(settings: InferenceSettings) -> InferenceSettings:
    """The settings for series of DICOM, whose grids usually differ."""
    return replace(settings, register="if needed") if settings.register == "never" else settings


def complete_study(
    study: Study,
    model: CrossConditionedModel,
    settings: InferenceSettings,
    origin: Origin | None = None,
    reference: Reference | None = None,
) -> Completed:
    """Complete a loaded study; `reference` see `read_reference`.

    What `origin.unread` may be is not synthesised, unless settings.targets names it.
    """
    start, origin = time.perf_counter(), origin or Origin()
    check_settings(model, settings)
    requested, not_filled = what_to_fill(tuple(study.volumes), model, settings, origin.unread)
    sources = tuple(m for m in model.config.sources if m in study.volumes)
    training: Mapping[str, Any] = model.record.get("training", {})
    findings = [
        *(Finding("doubtful recognition", "look", doubt) for doubt in origin.doubts),
        *check(study, model.baselines, model.config.modalities, training),
        *unlearnt(training.get("seen", {}), sources, requested, stripped=study.masked_background),
        *undertrained(training.get("validation"), requested),
        *_asked_for(requested, origin.unread),
    ]
    refused = {m: why for m, why in not_filled.items() if is_refusal(why, m)}
    if settings.targets is None:
        refused |= refusals(findings, requested)
    not_filled |= refused
    requested = [m for m in requested if m not in refused]
    made = _make(study, model, settings, sources, requested, reference)
    lost, at, why = _what_to_look_at(study, made)
    findings += lost
    judged = judge(findings, refused, requested, not_filled)
    manifest = {
        "format": FORMAT,
        "case": study.case,
        **judged,
        "synthetic": _synthetic_record(made, sources, judged["reasons"]),
        "not_filled": not_filled,
        "unread": _unread_record(origin.unread, not_filled, settings),
        "acquired": list(study.volumes),
        "inputs": {m: entry for m, entry in origin.files.items() if m in study.volumes},
        "given": dict(origin.files),
        "stamps": dict(origin.stamps),
        "normalisation": {m: asdict(n) for m, n in study.normalisation.items()},
        "intensity": LIKE_INPUT if made.maps else INTENSITY,
        "std": _std_record(model) if made.stds else None,
        "skull_stripped": study.masked_background,
        "look_at": {"mm": _in_mm(study, at), "why": why},
        "notes": list(
            dict.fromkeys((*study.notes, *(one.words for one in findings if one.words not in refused), *made.notes))
        ),
        "settings": settings_record(model, settings, reference),
        "seconds": round(time.perf_counter() - start, 3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("crossmr", "torch", "monai", "nibabel")},
    }
    return Completed(made.images, made.stds, manifest, made.head, made.synthesis, at)


class _Synthesised(NamedTuple):
    """What was synthesised of a study, and what is recorded of it."""

    images: Mapping[str, Any]
    stds: Mapping[str, Any]
    maps: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """Modality → the linear map from [0, 1] to the scale of the input."""
    notes: Sequence[str] = ()
    head: HeadVolumes | None = None
    synthesis: Synthesis | None = None


def _make(
    study: Study,
    model: CrossConditionedModel,
    settings: InferenceSettings,
    sources: Sequence[str],
    requested: Sequence[str],
    reference: Reference | None,
) -> _Synthesised:
    """Synthesise what is requested."""
    if not requested:
        return _Synthesised({}, {})
    head = _head_volumes(study, sources)
    wish = replace(settings, targets=tuple(requested))
    with _DEVICE:
        synthesis = synthesise(model, head, study.case, wish, reference and reference.head)
    maps = dict[str, dict[str, Any]]()
    if settings.scale == "input":
        maps = {m: _fit_map(study, synthesis.images[n], _like(m, sources)) for n, m in enumerate(synthesis.targets)}
    images, stds = _as_images(study, synthesis, sources, maps)
    return _Synthesised(images, stds, maps, _shortage(synthesis, model), head, synthesis)


def _what_to_look_at(study: Study, made: _Synthesised) -> tuple[list[Finding], Voxel, str]:
    """What the synthetic volumes may have lost, and the voxel of the head's box to look at first, with the reason."""
    head, spacing, stripped = study.mask[study.box()], study.reference.spacing_mm, study.masked_background
    centre = middle(head)
    if made.head is None or made.synthesis is None:
        return [], centre, "the middle of the head"
    volumes = dict(zip(made.synthesis.targets, made.synthesis.images.numpy(), strict=True))
    others = {m: study.normalised(m, study.box()) for m in study.volumes if m not in made.head.volumes}
    found, at = find_lesions({**made.head.volumes, **others}, head, spacing, volumes, stripped=stripped)
    if at is not None:
        return found, at, "the largest bright area of the acquired scans"
    if made.synthesis.stds is not None:
        at = most_uncertain(made.synthesis.stds.numpy().max(0), head, spacing, stripped=stripped)
    return (found, centre, "the middle of the head") if at is None else (found, at, "the largest standard deviation")


def _in_mm(study: Study, at: Voxel) -> list[float]:
    """A voxel (Z, Y, X) of the head's box in the mm of the study's grid, RAS+."""
    z, y, x = (place + side.start for place, side in zip(at, study.box(), strict=True))
    return [round(float(mm), 1) for mm in (study.reference.affine @ (x, y, z, 1))[:3]]


def _asked_for(requested: Sequence[str], unread: Sequence[Unread]) -> list[Finding]:
    """What may be a contrast that is synthesised all the same, because it was asked for by name."""
    return [
        Finding("not read", "look", f"{one.name} may be {m}, which was asked for by name.", (m,))
        for m in requested
        for one in unread
        if m in one.may_be
    ]


def _synthetic_record(
    made: _Synthesised, sources: Sequence[str], reasons: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the manifest says of each synthetic volume."""
    return {
        m: {
            "from": list(sources),
            "verdict": verdict_on(m, reasons),
            "warnings": [DISCLAIMER, *([ENHANCEMENT] if m == "t1c" else [])],
            "scale": made.maps.get(m),
        }
        for m in made.images
    }


def _unread_record(
    unread: Sequence[Unread], not_filled: Mapping[str, str], settings: InferenceSettings
) -> dict[str, list[str]]:
    """What stays missing without being asked for by name → what was not read and may be it."""
    missing = [m for m in not_filled if m not in (settings.targets or ())]
    found = {m: sorted({one.name for one in unread if m in one.may_be}) for m in missing}
    return {m: names for m, names in found.items() if names}


def _shortage(synthesis: Synthesis, model: CrossConditionedModel) -> list[str]:
    """What is to be said where less passed through the networks at once than usual."""
    usual = slices_at_once(math.prod(synthesis.images.shape[-2:]))
    if model.config.spatial_dims == 2 and synthesis.batch < usual:
        return [f"The device ran out of memory, so {synthesis.batch} slices were made at once, not {usual}."]
    if model.config.spatial_dims == 3 and synthesis.window != tuple(model.config.window):
        made, whole = ("×".join(map(str, window)) for window in (synthesis.window, model.config.window))
        return [f"The device ran out of memory, so windows of {made} voxels were made, not of {whole}."]
    return []


def _head_volumes(study: Study, modalities: Sequence[str]) -> HeadVolumes:
    """Some of a study's volumes as the networks read them."""
    box = study.box()
    volumes = {m: study.normalised(m, box) for m in modalities}
    return HeadVolumes.of(volumes, study.mask[box], study.reference.spacing_mm)


def _like(modality: str, sources: Sequence[str]) -> str:
    """The source whose intensities a synthetic volume gets with scale 'input'."""
    return LIKE[modality] if LIKE.get(modality) in sources else sources[0]


def _fit_map(study: Study, image: Tensor, like: str) -> dict[str, Any]:
    """The linear map that gives a synthetic volume the median and robust standard deviation of the scan `like`.

    'least' is the least that it may give: what is darkest in a head is below 0 by such a map, but in no scan.
    """
    inside = image[image > 0].numpy()
    q25, median, q75 = (float(q) for q in np.percentile(inside, (25, 50, 75))) if inside.size else (0.0, 0.0, 0.0)
    normalisation = study.normalisation[like]
    deviation = (normalisation.high - normalisation.low) / (HIGHEST - LOWEST)
    slope = deviation / ((q75 - q25) / 1.349 or 1 / (HIGHEST - LOWEST))
    lowest = min(0.0, float(study.volumes[like].data[study.mask_of(like)].min()))
    return {
        "like": like,
        "slope": slope,
        "intercept": normalisation.low - LOWEST * deviation - slope * median,
        "least": lowest + slope * DARKEST,  # 0 is outside the head
    }


def _as_images(
    study: Study, synthesis: Synthesis, sources: Sequence[str], maps: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Synthetic volumes and their standard deviations as nibabel images on the study's grid, on [0, 1] or mapped."""
    images, stds = {}, {}
    for index, modality in enumerate(synthesis.targets):
        image, slope = synthesis.images[index], 1.0
        if modality in maps:
            slope, intercept, least = (maps[modality][key] for key in ("slope", "intercept", "least"))
            image = torch.where(image > 0, (slope * image + intercept).clamp(min=least), 0)
        images[modality] = _on_grid(study, image, _description(modality, sources))
        if synthesis.stds is not None:
            std = slope * synthesis.stds[index]
            stds[modality] = _on_grid(study, std, _description(f"{modality} std", sources))
    return images, stds


def _on_grid(study: Study, cropped: Tensor, description: str) -> Any:
    """A head-cropped volume (Z, Y, X) on the study's reference grid, 0 outside, to be shown in its own window."""
    full = np.zeros(study.mask.shape, np.float32)
    full[study.box()] = cropped.numpy()
    full[~study.mask] = 0
    return on_grid(full, study.reference, description=description, display_range=window(full), copy=False)


def _std_record(model: CrossConditionedModel) -> dict[str, Any]:
    """What the manifest says of the standard deviations."""
    if not model.config.uncertainty:
        return {"of": "guided syntheses, uncalibrated: several times too small", "calibration": None}
    variance, targets = model.calibration.get("variance"), model.config.targets
    if variance is None:
        return {"of": "the unguided synthesis's error, learnt, uncalibrated", "calibration": None}
    fitted = calibrated_on(model.calibration, targets)
    others = {0: "not calibrated", INHERITED: "fitted to the errors of the model that its training started from"}
    said = [f"{display_name(target)}: {others[count]}" for target, count in fitted.items() if count in others]
    factors = {target: {"a": a, "c": c} for target, (a, c) in zip(targets, variance.tolist(), strict=True)}
    for target, count in fitted.items():
        if count is not None and count >= 0:
            factors[target]["patients"] = count
    how = "fitted to the errors on validation patients" if len(said) < len(targets) else ""
    return {
        "of": f"the unguided synthesis's error, learnt, {'; '.join([*([how] if how else []), *said])}",
        "calibration": factors,
    }


def read_reference(
    settings: InferenceSettings, model: CrossConditionedModel, mapping: Mapping[str, str] | None = None
) -> Reference | None:
    """The model's targets in the study that settings.reference names; None where it names none.

    Raises:
        ConfigError: the folder holds more than one study, or none of the targets.
    """
    if settings.reference is None:
        return None
    studies = find_studies(settings.reference, mapping)
    if len(studies) != 1:
        raise ConfigError(f"--reference {settings.reference} holds {len(studies)} studies; name one of them.")
    study = load_study(studies[0], register=settings.register, labels=False)
    targets = [target for target in model.config.targets if target in study.volumes]
    if not targets:
        raise ConfigError(
            f"--reference {settings.reference} has none of {', '.join(model.config.targets)}, which guide this model. "
            "Name a study that has one."
        )
    files = {m: entry for m, entry in hashes(studies[0].images()).items() if m in targets}
    return Reference(_head_volumes(study, targets), files)


def memory_needed(images: Mapping[str, Any], model: CrossConditionedModel, settings: InferenceSettings) -> int:
    """About how many bytes of main memory it takes to complete these volumes, by their headers; 0 if none is readable.

    The larger of two moments: all volumes are searched for the head; the first synthetic one is written.
    """
    study = study_memory(images, settings.register)
    if not study.shape:
        return 0
    targets = len(what_to_fill(tuple(images), model, settings)[0])
    read = 4 * study.head * len(images)  # as the networks read them
    writing = targets * (8 * study.head + 8) + 8 * study.head  # image and standard deviation, of head and grid; copies
    features = passing_memory(model.config, study.shape) if targets and model.device.type == "cpu" else 0
    return study.bytes(study.kept + read + writing) + features


def check_memory(
    case: str, images: Mapping[str, Any], model: CrossConditionedModel, settings: InferenceSettings
) -> str | None:
    """What to say of a study that takes more than half of the available memory.

    Raises:
        StudyError: it takes more than all.
    """
    return main_memory.check_memory(case, memory_needed(images, model, settings))


def _by_modality(study: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """The study under the names used everywhere inside: 'T1ce' becomes t1c."""
    images: dict[str, Any] = {}
    for text, image in study.items():
        modality = modality_name(text, modalities)
        if modality in images:
            raise NamingError(f"The study names {modality} twice, in two spellings. Keep one of them.")
        images[modality] = image
    return images


def hashes(images: Mapping[str, Any]) -> dict[str, Any]:
    """File name and SHA-256 of every image that is a file."""
    paths = {m: Path(image) for m, image in images.items() if isinstance(image, (str, Path))}
    return {m: {"file": path.name, "sha256": content_sha256(path)} for m, path in paths.items()}


def _description(modality: str, sources: Sequence[str]) -> str:
    """What the header says, in the 79 characters it has."""
    return f"SYNTHETIC {modality} by crossmr {version('crossmr')} from {'+'.join(sources)}"[:79]


def settings_record(
    model: CrossConditionedModel, settings: InferenceSettings, reference: Reference | None
) -> dict[str, Any]:
    """Everything that decides the voxels, for the manifest."""
    return {
        "model_sha256": model.record.get("sha256"),
        "sources": list(model.config.sources),
        "targets": [t for t in model.config.targets if settings.targets is None or t in settings.targets],
        "guidance": chosen_guidance(model, settings),
        "planes": chosen_planes(model, settings),
        "ddim_steps": settings.ddim_steps,
        "samples": samples_drawn(model, settings),
        "reference": reference and dict(reference.files),
        "seed": settings.seed,
        "register": settings.register,
        "scale": settings.scale,
        "device": model.device.type,
        "precision": str(choose_precision(settings.precision, model.device)).removeprefix("torch."),
    }
