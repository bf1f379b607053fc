"""Completing studies: what is missing is synthesised from what is there, on its exact grid, and labelled synthetic."""

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossmr.checks import check
from crossmr.data.dataset import as_inputs, fit_size, seeded, useful_slices
from crossmr.data.dicom import convert
from crossmr.data.naming import find_studies, modality_name
from crossmr.data.series import holds_dicom
from crossmr.data.study import Study, load_study
from crossmr.data.volume import content_sha256, on_grid
from crossmr.device import choose_device, choose_precision, in_batches
from crossmr.diffusion import ddim_timesteps
from crossmr.errors import ConfigError, NamingError, StudyError
from crossmr.model import GUIDANCES, CrossConditionedModel, Guidance, load_model
from crossmr.picture import Column, middle
from crossmr.store import find_model
from crossmr.trivial import resize

EXPECTED = ("t1n", "t1c", "t2w", "t2f")
"""A whole study; what of it a model cannot fill is said."""
FORMAT = "crossmr-completion"
MEAN_OF = 8
"""Samples whose mean guides, unless --samples says otherwise."""
BATCH = 16
"""Slices synthesised at once."""
INTENSITY = {
    "range": [0, 1],
    "meaning": "the model's normalised scale: 0 is air, 1 four times the median within the head of a real scan; "
    "no MR unit",
}
ENHANCEMENT = (
    "Contrast enhancement cannot in general be inferred from unenhanced images: "
    "absence or presence of enhancement in this synthetic T1ce is no finding."
)
DISCLAIMER = "Synthetic, for research use only; crossmr is not a medical device."


@dataclass(frozen=True)
class Settings:
    """How to complete; the same settings and inputs give the same voxels."""

    targets: tuple[str, ...] | None = None
    """Modalities wanted; None for all that are missing and the model knows."""
    guidance: Guidance | None = None
    """'sample' (MDN told the sources), 'unconditional' (as published), 'mean' (one synthesis, guided by the mean of the
    samples), 'reference' (the representation of another study's real scans), 'none'; None for `default_guidance`."""
    steps: int = 50
    """DDIM steps of the MDN."""
    samples: int | None = None
    """Guided syntheses whose mean the image is, where it is guided; None for one. With guidance 'mean' the samples
    whose mean guides it; None for eight."""
    reference: Path | None = None
    """Folder of the study that guidance 'reference' looks at: an earlier visit, or one of the site's protocol."""
    eta: float = 1.0
    """0 makes DDIM deterministic, 1 as random as DDPM."""
    seed: int = 0
    """Of the sampled representation; each case derives its own from it and its name."""
    precision: str = "auto"
    """'auto', 'bfloat16' or 'float32'."""
    registered: bool | None = False
    """Move a study's volumes onto the first one's grid; None where they lie on others. See `load_study`."""

    def __post_init__(self) -> None:
        if self.guidance is not None and self.guidance not in GUIDANCES:
            raise ConfigError(f"--guidance is '{self.guidance}'; wanted one of {', '.join(GUIDANCES)}.")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"--samples is {self.samples}; wanted at least 1.")
        if (self.guidance == "reference") != (self.reference is not None):
            raise ConfigError("--guidance reference and --reference STUDY go together; give both, or neither.")


@dataclass(frozen=True, eq=False)
class Completed:
    """What became of one study."""

    images: Mapping[str, Any]
    """Modality → nibabel image on the reference's grid, float32 in [0, 1], its header marked SYNTHETIC."""
    deviations: Mapping[str, Any]
    """Modality → how far each voxel may be off, a standard deviation on the image's scale; empty where the model has no
    network for it and draws one sample."""
    manifest: Mapping[str, Any]
    """Inputs with hashes, model, seed, guidance, scale, what could not be filled and why."""
    columns: Sequence[Column] = ()
    """The acquired and the synthetic volumes, cut in three, for a picture."""
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of (Z, Y, X)."""


class Reference(NamedTuple):
    """Real scans that guide."""

    volumes: Mapping[str, npt.NDArray[np.float32]]
    """Modality → volume (Z, Y, X) in [0, 1], head-cropped."""
    files: Mapping[str, Any]
    """What the manifest says of them."""


def complete(
    study: Path | str | Mapping[str, Any],
    model: CrossConditionedModel | Path | str | None = None,
    *,
    targets: Sequence[str] | None = None,
    guidance: Guidance | None = None,
    steps: int = 50,
    samples: int | None = None,
    reference: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    registered: bool = False,
    case: str = "study",
) -> Completed:
    """Synthesise what a study lacks and return it; nothing is written.

    Args:
        study: the study's folder, of NIfTI or of DICOM, or modality → path or nibabel image, such as
            {"t1n": "t1.nii.gz"}.
        model: a model, the folder of one, or the name of one at hand; None for the default.
        targets: modalities wanted; all that are missing and the model knows by default.
        guidance: see `Settings`.
        steps: DDIM steps.
        samples: see `Settings`.
        reference: see `Settings`.
        seed: of the sampled representation.
        device: 'auto', 'cpu', 'cuda', 'mps'; a model that was already loaded stays where it is.
        precision: see `Settings`.
        registered: see `Settings`.
        case: the study's name where it has none: it seeds the sample.

    Raises:
        CrossmrError: with one line that says what is wrong with the study, the model or the wish.
    """
    if not isinstance(model, CrossConditionedModel):
        model = load_model(find_model(model), choose_device(device))
    settings = Settings(
        None if targets is None else tuple(targets),
        guidance,
        steps=steps,
        samples=samples,
        reference=None if reference is None else Path(reference),
        seed=seed,
        precision=precision,
        registered=registered,
    )
    known = read_reference(settings.reference, model, registered=registered)
    if isinstance(study, Mapping):
        given = _by_modality(study, model.config.modalities)
        return complete_study(load_study(given, case, registered=registered), model, settings, hashes(given), known)
    with contextlib.ExitStack() as stack:
        if scanned := holds_dicom(Path(study)):
            scans = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crossmr-")))
            for refused in (one.refused for one in convert(Path(study), scans) if one.refused):
                raise StudyError(refused)
        found = find_studies(scans if scanned else Path(study))
        if len(found) != 1:
            raise NamingError(f"{study} holds {len(found)} studies; name one of them, or use complete_cohort.")
        loaded = load_study(found[0], registered=registered or (None if scanned else False))
        return complete_study(loaded, model, settings, hashes(found[0].images()), known)


def complete_study(
    study: Study,
    model: CrossConditionedModel,
    settings: Settings,
    inputs: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
) -> Completed:
    """Complete a loaded study; `inputs` is what the manifest says of its files, `reference` see `read_reference`."""
    start = time.perf_counter()
    check_settings(model, settings)
    config = model.config
    wanted, not_filled = what_to_fill(tuple(study.volumes), model, settings)
    used = [m for m in config.sources if m in study.volumes]
    images: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    columns: list[Column] = []
    notes = [*study.notes, *check(study, model.trivial, config.modalities, _seen(model))]
    if wanted:
        box = study.box()
        sources = {m: study.normalised(m, box) for m in used}
        head, at = study.mask[box].sum((1, 2)).tolist(), middle(study.mask[box])
        seen = torch.from_numpy(study.mask[box]) if study.masked_background else torch.tensor(True)
        columns = [Column.of(m, "acquired", volume, at) for m, volume in sources.items()]
        known = reference and reference.volumes
        synthesis = synthesise(model, sources, head, study.case, settings, wanted=wanted, reference=known)
        if synthesis.batch < BATCH:
            notes.append(f"The device ran out of memory, so {synthesis.batch} slices were made at once, not {BATCH}.")
        for index, modality in enumerate(wanted):
            images[modality] = _on_grid(study, synthesis.images[index], _description(modality, used), 1.0)
            columns.append(Column.of(modality, "synthetic", (synthesis.images[index] * seen).numpy(), at))
            if synthesis.deviations is not None:
                deviation = synthesis.deviations[index]
                said = _description(f"{modality} std", used)
                deviations[modality] = _on_grid(study, deviation, said, max(float(deviation.max()), 1e-3))
                columns.append(Column.of(modality, "deviation", (deviation * seen).numpy(), at))
    manifest = {
        "format": FORMAT,
        "case": study.case,
        "synthetic": {
            modality: {
                "from": used,
                "warnings": [DISCLAIMER, *([ENHANCEMENT] if modality == "t1c" else [])],
            }
            for modality in images
        },
        "not_filled": not_filled,
        "acquired": list(study.volumes),
        "inputs": {m: entry for m, entry in (inputs or {}).items() if m in study.volumes},
        "normalisation": {m: {"low": n.low, "high": n.high} for m, n in study.normalisation.items()},
        "intensity": INTENSITY,
        "deviation": _deviation_record(model) if deviations else None,
        "skull_stripped": study.masked_background,
        "notes": notes,
        "settings": recorded(model, settings, reference),
        "seconds": round(time.perf_counter() - start, 3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("crossmr", "torch", "monai", "nibabel")},
    }
    return Completed(images, deviations, manifest, columns, study.reference.spacing_mm)


def _on_grid(study: Study, cropped: Tensor, description: str, brightest: float) -> Any:
    """A head-cropped volume (Z, Y, X) on the study's reference grid, 0 outside."""
    full = np.zeros(study.mask.shape, np.float32)
    full[study.box()] = cropped.numpy()
    if study.masked_background:
        full[~study.mask] = 0
    return on_grid(full, study.reference, description=description, display_range=(0.0, brightest))


def _seen(model: CrossConditionedModel) -> Mapping[str, int]:
    """What the model was trained on, as far as it says."""
    seen: Mapping[str, int] = model.record.get("training", {}).get("seen", {})
    return seen


def _deviation_record(model: CrossConditionedModel) -> dict[str, Any]:
    """What the manifest says of the standard deviations."""
    if model.uncertainty is None:
        return {"of": "guided syntheses, uncalibrated: far too sure", "calibration": None}
    variance = model.calibration.get("variance")
    factors = None if variance is None else dict(zip(model.config.targets, variance.tolist(), strict=True))
    return {
        "of": "the unguided synthesis's error, learnt, "
        + ("scaled to what held-out patients show" if factors else "uncalibrated"),
        "calibration": factors and {target: {"a": a, "b": b} for target, (a, b) in factors.items()},
    }


def read_reference(
    folder: Path | None,
    model: CrossConditionedModel,
    mapping: Mapping[str, str] | None = None,
    *,
    registered: bool | None = False,
) -> Reference | None:
    """The model's targets in a study; None of no folder.

    Raises:
        ConfigError: the folder holds more than one study, or none of the targets.
    """
    if folder is None:
        return None
    found = find_studies(folder, mapping)
    if len(found) != 1:
        raise ConfigError(f"--reference {folder} holds {len(found)} studies; name one of them.")
    study = load_study(found[0], registered=registered)
    known = [target for target in model.config.targets if target in study.volumes]
    if not known or (len(known) < len(model.config.targets) and not model.config.representation.cell):
        wanted = ", ".join(model.config.targets)
        raise ConfigError(
            f"--reference {folder} has {', '.join(known) or 'none'} of {wanted}, which guide this model. "
            "Name a study that has them."
        )
    files = {m: entry for m, entry in hashes(found[0].images()).items() if m in known}
    return Reference({target: study.normalised(target, study.box()) for target in known}, files)


def check_settings(model: CrossConditionedModel, settings: Settings) -> None:
    """Refuse, before anything runs, what this model cannot do.

    Raises:
        ConfigError: a target it was not trained for, a condition its MDN does not know, an impossible step count.
    """
    for target in settings.targets or ():
        if target not in model.config.targets:
            known = ", ".join(model.config.targets)
            raise ConfigError(f"This model cannot synthesise {target}; it was trained for {known}.")
    if settings.guidance in ("sample", "mean") and not model.config.distribution.conditional:
        raise ConfigError("This model's MDN knows no condition; use guidance 'unconditional' or 'none'.")
    if settings.samples and (guidance := chosen_guidance(model, settings)) in ("none", "reference"):
        raise ConfigError(f"--samples are drawn, and guidance '{guidance}' draws none; add --guidance sample.")
    ddim_timesteps(model.config.distribution.schedule.steps, settings.steps)
    choose_precision(settings.precision, model.device)


def what_to_fill(
    acquired: Sequence[str], model: CrossConditionedModel, settings: Settings
) -> tuple[list[str], dict[str, str]]:
    """Which targets to synthesise, and for every other gap the reason why not."""
    config = model.config
    missing = [m for m in dict.fromkeys((*EXPECTED, *config.targets)) if m not in acquired]
    if settings.targets is not None:
        missing = [m for m in missing if m in settings.targets]
    lacking = [source for source in config.sources if source not in acquired]
    enough = not lacking or (config.any_subset and len(lacking) < len(config.sources))
    wanted, not_filled = [], {}
    for modality in missing:
        if modality not in config.targets:
            not_filled[modality] = f"the model was trained for {', '.join(config.targets)} only"
        elif enough and not _learnt_together(model, [m for m in config.sources if m in acquired], modality):
            together = ", ".join(m for m in config.sources if m in acquired)
            not_filled[modality] = f"no training patient had {modality} together with {together}"
        elif not enough and config.any_subset:
            not_filled[modality] = f"the model needs any of {', '.join(config.sources)}, and none is there"
        elif not enough:
            not_filled[modality] = f"the model needs {', '.join(config.sources)}, and {', '.join(lacking)} is missing"
        else:
            wanted.append(modality)
    return wanted, not_filled


def _learnt_together(model: CrossConditionedModel, sources: Sequence[str], target: str) -> bool:
    """Whether any training patient had a target and these sources, as far as the model says which they had."""
    present, known = model.trivial.get("present"), model.config.modalities
    if not model.config.any_subset or present is None:
        return True
    return bool((present[:, [known.index(m) for m in (*sources, target)]] > 0).all(1).any())


class Synthesis(NamedTuple):
    """The targets of a volume that are wanted."""

    images: Tensor
    """(W, Z, Y, X) in [0, 1]."""
    deviations: Tensor | None
    """(W, Z, Y, X), standard deviation of each voxel's error: learnt with cells, or else of two or more samples."""
    batch: int = BATCH
    """Slices made at once."""


@torch.no_grad()
def synthesise(
    model: CrossConditionedModel,
    sources: Mapping[str, npt.NDArray[np.float32]],
    head_voxels: Sequence[int],
    case: str,
    settings: Settings,
    *,
    wanted: Sequence[str] | None = None,
    network: str = "synthesis",
    reference: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Synthesis:
    """Synthesise targets on the CPU from sources, modality → volume (Z, Y, X) in [0, 1], head-cropped.

    All of the model's targets, unless some are `wanted`, and in that order. A model of any subset may be shown some of
    its sources only; what it says of these themselves means nothing.

    Representations are drawn from seeds derived from settings.seed and the case's name: one pooled vector for the
    volume, or a grid for each slice from noise that all slices share. The image is the mean of the guided syntheses,
    or the unguided one. Axial slices without any head stay zero. `network` may be 'twin', which nothing guides.
    `reference` are real scans of targets, head-cropped and in [0, 1]; guidance 'reference' stretches them to this head.
    """
    config, device = model.config, model.device
    dims, cells = config.spatial_dims, bool(config.representation.cell)
    dtype = choose_precision(settings.precision, device)
    guidance, count = chosen_guidance(model, settings), samples_drawn(model, settings)
    if network == "twin":
        guidance, count = "none", 0
    kept = [config.targets.index(target) for target in wanted or config.targets]
    volumes, shown = _volumes(sources, config.sources), torch.tensor([float(m in sources) for m in config.sources])
    shape, context, inwards = volumes[0].shape[1:], config.context_slices, config.context_slices * len(config.sources)
    keys = [("case", settings.seed, case, *([k] if k else ())) for k in range(count)]
    chosen = {"steps": settings.steps, "eta": settings.eta}
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        vectors: list[Tensor] = []
        if count and not cells:
            pooled = None
            if guidance in ("sample", "mean"):
                inputs = _inputs(volumes, useful_slices(head_voxels), dims, config.divisor)
                pooled = torch.cat([model.pool_sources(chunk.to(device)) for chunk in torch.split(inputs, BATCH)])
            vectors = list(model.guide(pooled, [seeded(*key) for key in keys], **chosen))  # type: ignore[arg-type]
            vectors = [torch.stack(vectors).mean(0)] if guidance == "mean" else vectors

        def run(images: Tensor, y_0: Tensor | None) -> Tensor:
            return cast(Tensor, getattr(model, network)(images, y_0)).float().clamp(0, 1)

        def drawn_cells(images: Tensor, unguided: Tensor) -> Tensor:
            generators = [seeded(*key) for key in keys]
            told = guidance in ("sample", "mean")
            grids = model.guide_cells(images, unguided, generators, told=told, **chosen)  # type: ignore[arg-type]
            return grids.mean(0, keepdim=True) if guidance == "mean" else grids

        def predict(channels: Tensor) -> Tensor:
            """Images and, where there are any, their deviations as further channels."""
            around, real = channels[:, :inwards], channels[:, inwards:]
            images = model.inputs(around, shown.to(around).expand(len(around), -1))
            unguided = run(images, None) if cells or guidance == "none" else None
            if guidance == "none":
                guided = []
            elif guidance == "reference":
                guided = [model.guidance_of(real, _wanted(model, images, real))]
            elif cells:
                guided = list(drawn_cells(images, cast(Tensor, unguided)))
            else:
                guided = [y_0.expand(len(images), -1) for y_0 in vectors]
            made = torch.stack([run(images, y_0) for y_0 in guided]) if guided else cast(Tensor, unguided)[None]
            made = made[:, :, kept]
            if cells:
                return torch.cat([made.mean(0), model.deviation(images, cast(Tensor, unguided))[:, kept]], 1)
            return made.mean(0) if len(made) < 2 else torch.cat([made.mean(0), made.std(0)], 1)

        slices, batch = [z for z, voxels in enumerate(head_voxels) if voxels], BATCH
        real: Sequence[Tensor] = ()
        if guidance == "reference":
            stretched = {m: np.clip(resize(volume, shape), 0, 1) for m, volume in (reference or {}).items()}
            real = _volumes(stretched, config.targets)

        def given(chosen: Sequence[int]) -> Tensor:
            """What is there of some slices, or of the volume: the sources and, where real scans guide, these."""
            around = _inputs(volumes, chosen, dims, config.divisor, context)
            if real:
                around = torch.cat([around, _inputs(real, chosen, dims, config.divisor)], 1)
            return around.to(device)

        if dims == 3:
            from monai.inferers import sliding_window_inference

            window = sliding_window_inference(given(slices), config.window, 1, predict, overlap=0.25, mode="gaussian")
            result = fit_size(cast(Tensor, window)[0].cpu(), shape, [0.5] * 3)
        else:

            def predict_some(some: slice) -> Tensor:
                return predict(given(slices[some]).contiguous(memory_format=torch.channels_last)).cpu()

            result = torch.zeros(0)
            for some, made, at_once in in_batches(predict_some, len(slices), BATCH):
                batch = at_once
                if not len(result):
                    result = torch.zeros(made.shape[1], *shape)
                result[:, slices[some]] = fit_size(made, shape[1:], [0.5] * 2).transpose(0, 1)
        images, deviations = result[: len(kept)].clamp_(0, 1), result[len(kept) :]
        if not len(deviations):
            return Synthesis(images, None, batch)
        deviations[:, [z for z, voxels in enumerate(head_voxels) if not voxels]] = 0
        return Synthesis(images, deviations, batch)


def _wanted(model: CrossConditionedModel, inputs: Tensor, real: Tensor) -> Tensor:
    """Which targets (N, T) real scans (N, T, *S) guide: not what is black, nor, for any subset, what is shown."""
    there = (real.flatten(2).amax(-1) > 0).float()
    return there * (1 - model.shown(inputs)) if model.config.any_subset else there


def _volumes(given: Mapping[str, npt.NDArray[np.float32]], modalities: Sequence[str]) -> list[Tensor]:
    """The volume of each modality, (1, Z, Y, X), uncopied; what is missing is zero, without memory of its own."""
    nothing = torch.zeros(()).expand(next(iter(given.values())).shape)
    return [(torch.from_numpy(given[m]) if m in given else nothing)[None] for m in modalities]


def _inputs(volumes: Sequence[Tensor], *how: Any) -> Tensor:
    """What `as_inputs` makes of all of these volumes, as channels."""
    return torch.cat([as_inputs(volume, *how) for volume in volumes], 1)


def chosen_guidance(model: CrossConditionedModel, settings: Settings) -> Guidance:
    """The guidance that is asked for, or else the default."""
    return settings.guidance or default_guidance(model)


def samples_drawn(model: CrossConditionedModel, settings: Settings) -> int:
    """How many representations are drawn."""
    guidance = chosen_guidance(model, settings)
    return 0 if guidance in ("none", "reference") else settings.samples or (MEAN_OF if guidance == "mean" else 1)


def default_guidance(model: CrossConditionedModel) -> Guidance:
    """The guidance that the C-UNet was trained with, as far as it is to be had at completion.

    With cells it is none: the mean of guided syntheses is no better than the unguided one (docs/evidence.md).
    """
    trained = model.config.guidance
    if model.config.representation.cell:
        return "none"
    if trained == "truth":
        return "sample" if model.config.distribution.conditional else "unconditional"
    return trained


def _by_modality(study: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The study under the names used everywhere inside: 'T1ce' becomes t1c."""
    given: dict[str, Any] = {}
    for text, image in study.items():
        modality = modality_name(text, known)
        if modality in given:
            raise NamingError(f"The study names {modality} twice, in two spellings. Keep one of them.")
        given[modality] = image
    return given


def hashes(images: Mapping[str, Any]) -> dict[str, Any]:
    """File name and SHA-256 of every image that is a file."""
    paths = {m: Path(image) for m, image in images.items() if isinstance(image, (str, Path))}
    return {m: {"file": path.name, "sha256": content_sha256(path)} for m, path in paths.items()}


def _description(modality: str, sources: Sequence[str]) -> str:
    """What the header says, in the 79 characters it has."""
    return f"SYNTHETIC {modality} by crossmr {version('crossmr')} from {'+'.join(sources)}"[:79]


def recorded(model: CrossConditionedModel, settings: Settings, reference: Reference | None) -> dict[str, Any]:
    """Everything that decides the voxels, for the manifest."""
    return {
        "model_sha256": model.record.get("sha256"),
        "sources": list(model.config.sources),
        "targets": [t for t in model.config.targets if settings.targets is None or t in settings.targets],
        "guidance": chosen_guidance(model, settings),
        "ddim_steps": settings.steps,
        "samples": samples_drawn(model, settings),
        "eta": settings.eta,
        "reference": reference and dict(reference.files),
        "seed": settings.seed,
        "registered": settings.registered,
        "device": model.device.type,
        "precision": str(choose_precision(settings.precision, model.device)).removeprefix("torch."),
    }
