"""One study as a case of a prepared dataset: checked, normalised, cropped to the head, its arrays written.

CASE/
├── images.npy         float16 (Z, M, Y, X) in [0, 1], 0 outside the head, M as in case.json
├── masks.npy          uint8 (Z, 2, Y, X): head mask, lesion labels
└── case.json          written first without and last with a signature: a case that has none does not exist
"""

import contextlib
import hashlib
import io
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.formats import content_sha256, parts, unreadable
from crossmr.data.head import HIGHEST, LOWEST
from crossmr.data.labels import RULE as RULE_OF_LABELS
from crossmr.data.naming import StudyFiles
from crossmr.data.registration import RULE as RULE_OF_REGISTRATION
from crossmr.data.registration import RegistrationMode
from crossmr.data.study import Study, load_study, study_memory
from crossmr.data.volume import voxels_sha256
from crossmr.errors import CrossmrError, OutputError, SetError, VolumeError
from crossmr.files import digest, read_json, write_atomically, write_json
from crossmr.main_memory import check_memory

FORMAT_VERSION = 4
ARRAYS = ("images.npy", "masks.npy")
NORMALISATION = (
    f"0 to 1 from {-LOWEST:g} robust standard deviations (quartile range / 1.349) below each volume's median within "
    f"the head to {HIGHEST:g} above it, saturating; exactly 0 is outside the head, or not acquired"
)
MARGIN = 4
"""Voxels of background kept around the head's bounding box."""


class Unread(str):
    """Why a study was refused whose files could not be read; they may be all right."""


Prepared = dict[str, Any] | str
"""The record of a prepared case, or why a study was refused."""


def prepare_case(files: StudyFiles, out: Path, register: RegistrationMode = "never") -> Prepared:
    """Prepare one study; returns the record that case.json holds, or the reason for refusing the study.

    Raises:
        OutputError: the dataset cannot be written, so that no other study could be either.
    """
    try:
        signature = _signature(files, register)
        folder = out / "cases" / files.case
        finished = _finished(folder, signature)
        if finished is not None:
            return finished
        check_memory(files.case, study_memory(files.images(), register).bytes())
        return _write_case(load_study(files, register=register), files, signature, folder)
    except OutputError:
        raise
    except CrossmrError as error:
        reason = error.__cause__
        unread = isinstance(reason, OSError) and reason.errno is not None  # a damaged gzip file has none
        return Unread(error) if unread else str(error)
    except OSError as error:
        raise OutputError(f"{out} could not be written: {error.strerror or error}. Name another folder.") from error


def _finished(folder: Path, signature: str) -> dict[str, Any] | None:
    """The record in case.json, if it is of these very files and both arrays are complete; else None."""
    try:
        record = read_json(folder / "case.json", SetError)
        if record.get("signature") != signature:
            return None
        for name in ARRAYS:
            np.lib.format.open_memmap(folder / name, mode="r")
    except (SetError, OSError, ValueError):
        return None
    return record


def _signature(files: StudyFiles, register: RegistrationMode) -> str:
    """A hash that changes with the study's files, their modalities, the registration, this format, and the rules."""
    label = files.label()
    stats = []
    for role, path in (*files.images().items(), *([] if label is None else [("seg", label)])):
        try:
            for part in parts(path):
                stats.append((role, part.name, *_size_and_time(part)))
        except VolumeError as error:
            raise VolumeError(f"{files.case}: {error}") from error.__cause__ or error
    registration = {} if register == "never" else {"registered": True if register == "always" else register}
    rules = {} if label is None else {"rule_of_labels": RULE_OF_LABELS}
    rules |= {} if register == "never" else {"rule_of_registration": RULE_OF_REGISTRATION}
    return digest({"version": FORMAT_VERSION, "margin": MARGIN, "files": sorted(stats), **registration, **rules})


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError as error:
        raise unreadable(path, error) from error


def _write_case(study: Study, files: StudyFiles, signature: str, folder: Path) -> dict[str, Any]:
    """Write the arrays, then case.json; returns the record that it holds."""
    z, y, x = box = study.box(MARGIN)
    modalities = list(study.volumes)
    images = np.empty((z.stop - z.start, len(modalities), y.stop - y.start, x.stop - x.start), np.float16)
    for index, modality in enumerate(modalities):  # one after the other: memory
        images[:, index] = study.normalised(modality, box)
    labels = np.zeros_like(study.mask, np.uint8) if study.labels is None else study.labels
    masks = np.stack([study.mask[box].astype(np.uint8), labels[box]], axis=1)
    write_json(folder / "case.json", {"signature": "", "files": dict.fromkeys(ARRAYS, "")})  # begun, and ours
    hashes = {
        "images.npy": _write_array(folder / "images.npy", images),
        "masks.npy": _write_array(folder / "masks.npy", masks),
    }
    case = {
        "format_version": FORMAT_VERSION,
        "modalities": modalities,
        "shape": list(study.mask.shape),
        "spacing_mm": [round(float(s), 6) for s in study.reference.spacing_mm],
        "box": [[s.start, s.stop] for s in (z, y, x)],
        "masked_background": study.masked_background,
        "labelled": study.labels is not None,
        "label_values": list(study.label_values),
        "notes": list(study.notes),
        "normalisation": {m: asdict(n) for m, n in study.normalisation.items()},
        "statistics": {m: _statistics(images[:, i], masks[:, 0] > 0) for i, m in enumerate(modalities)},
        "head_voxels": [int(n) for n in (masks[:, 0] > 0).sum((1, 2))],
        "lesion_voxels": [int(n) for n in (masks[:, 1] > 0).sum((1, 2))] if study.labels is not None else [],
        "inputs": {path.name: content_sha256(path) for path in files.images().values()},
        "scans": {m: voxels_sha256(volume) for m, volume in study.volumes.items()},
        "files": hashes,
        "signature": signature,
    }
    write_json(folder / "case.json", case)
    return case


def _statistics(image: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation within the head of one normalised modality."""
    inside = image[mask].astype(np.float32)
    return {"mean": round(float(inside.mean()), 6), "std": round(float(inside.std()), 6)}


def _write_array(path: Path, array: np.ndarray) -> str:
    """Write an .npy file; returns its SHA-256."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    content = b"".join([header.getvalue(), array.data])
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def is_case(folder: Path, listed: Collection[str]) -> bool:
    """Whether a folder is empty, or a case of ours: by its case.json, or by the manifest that lists it."""
    if not folder.is_dir():
        return False
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(path.is_symlink() or not path.is_file() for path in files if path.name in (*ARRAYS, "case.json")):
        return False
    return not files or folder.name in listed or read_record(folder) is not None


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a case.json of ours holds, finished or begun; else None."""
    with contextlib.suppress(SetError):
        record = read_json(folder / "case.json", SetError)
        files = record.get("files")
        if "signature" in record and isinstance(files, dict) and set(files) == set(ARRAYS):
            return record
    return None


def read_prepared(folder: Path) -> dict[str, Any] | None:
    """The record of a case that was prepared to its end."""
    record = read_record(folder)
    return record if record and record["signature"] else None


def delete_case(folder: Path) -> None:
    """Delete a prepared case, and its folder if nothing else lies in it."""
    with contextlib.suppress(OSError):
        for name in ("case.json", *ARRAYS):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
