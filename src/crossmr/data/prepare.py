"""A cohort of studies into a prepared set: checked, normalised, cropped to the head, ready to be mapped.

SET/
├── manifest.json          what is in it: fingerprint, split, every case, every refusal
└── cases/CASE/
    ├── images.npy         float16 (Z, M, Y, X) in [0, 1], M the case's modalities in the order of case.json
    ├── masks.npy          uint8 (Z, 2, Y, X): head mask, lesion labels
    └── case.json          written last: a case without it does not exist
"""

import contextlib
import hashlib
import io
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.naming import StudyFiles, find_studies
from crossmr.data.study import MEDIANS, Study, load_study
from crossmr.data.volume import content_sha256
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, OutputError, SetError, VolumeError
from crossmr.files import digest, read_json, sole_writer, write_atomically, write_json

FORMAT = "crossmr-set"
FORMAT_VERSION = 2
PARTS = ("train", "val", "test")
ARRAYS = ("images.npy", "masks.npy")
NORMALISATION = f"0 = air, 1 = {MEDIANS:g} times the median within the head above air, per volume, saturating"
MARGIN = 4
"""Voxels kept around the head's bounding box."""


@dataclass(frozen=True)
class Split:
    """How patients are shared out; by patient, never by slice or visit."""

    train: float = 0.7
    """Share of patients whose studies train the networks."""
    val: float = 0.1
    """Share watched during training."""
    test: float = 0.2
    """Share that training never sees."""
    seed: int = 0
    """Seed of the hash that orders the patients."""

    def __post_init__(self) -> None:
        shares = (self.train, self.val, self.test)
        if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6 and self.train > 0):  # NaN fails too
            raise ConfigError(f"--split is {shares}; wanted train/val/test shares that sum to 1, such as 70/10/20.")

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Split":
        """Read '70/10/20'."""
        try:
            numbers = [float(part) for part in text.split("/")]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or sum(numbers) <= 0:
            raise ConfigError(f"--split is '{text}'; wanted train/val/test in percent, such as 70/10/20.")
        train, val, test = (number / sum(numbers) for number in numbers)
        return cls(train, val, test, seed)


def assign_parts(patients: Sequence[str], split: Split) -> dict[str, str]:
    """Give each patient a part by the hash of seed and name.

    A patient's place on the hash line never changes, so a cohort that grows moves nobody from test to train,
    but for the few patients needed to leave no wanted part empty in a small cohort.
    """
    place = {p: int(digest(f"{split.seed}:{p}")[:13], 16) / 16**13 for p in set(patients)}
    parts = {
        p: "train" if x < split.train else "val" if x < split.train + split.val else "test" for p, x in place.items()
    }
    order = sorted(place, key=lambda p: place[p])
    wanted = [part for part, share in zip(PARTS, (split.train, split.val, split.test), strict=True) if share > 0]
    wanted = wanted[: len(order)]
    for part in wanted:
        if part not in parts.values():
            spare = [p for p in order if parts[p] not in wanted or list(parts.values()).count(parts[p]) > 1]
            parts[spare[0] if part == "train" else spare[-1]] = part
    return {p: parts[p] for p in order}


@sole_writer("out")
def prepare(
    cohorts: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    mapping: Mapping[str, str] | None = None,
    split: Split | None = None,
    registered: bool = False,
    workers: int = 1,
    display: Display = SILENT,
) -> dict[str, Any]:
    """Check, normalise and crop every study of the cohorts into the set `out`, and return its manifest.

    A study that is refused is listed with its reason under 'refused'; the others go on. Run again, finished
    cases whose files have not changed are kept; cases no longer in the cohorts are deleted from the set. `registered`:
    see `load_study`.

    Raises:
        NamingError: a cohort without any study. ConfigError: two studies of one name. SetError: every study
            was refused. OutputError: cannot write, or `out` holds something else.
    """
    out, split = Path(out), split or Split()
    folders = [Path(c) for c in ([cohorts] if isinstance(cohorts, (str, Path)) else cohorts)]
    found = [study for folder in folders for study in find_studies(folder, mapping)]
    names = [study.case for study in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"The cohorts share study names ({', '.join(twice[:3])}); rename them or prepare them apart.")
    _check_out(out)
    cases, refused = {}, {}
    with display.task("prepare", len(found)) as task:
        for study, result in _each(found, out, workers, registered):
            if isinstance(result, str):
                refused[study.case] = result
            else:
                cases[study.case] = result
            task.advance(study.case)
    if not cases:
        reasons = "; ".join(list(refused.values())[:3])
        raise SetError(f"None of the {len(found)} studies could be prepared: {reasons}")
    for stale in sorted((out / "cases").iterdir()):
        if stale.name not in cases and _is_case(stale):
            shutil.rmtree(stale, ignore_errors=True)
    parts = assign_parts([case["patient"] for case in cases.values()], split)
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(cases),
        "normalisation": NORMALISATION,
        "split": {
            "seed": split.seed,
            "shares": [split.train, split.val, split.test],
            "sha256": digest(parts),
            **{part: sorted(p for p in parts if parts[p] == part) for part in PARTS},
        },
        "refused": [{"case": case, "reason": refused[case]} for case in sorted(refused)],
        "cases": {case: {"part": parts[cases[case]["patient"]], **cases[case]} for case in sorted(cases)},
    }
    write_json(out / "manifest.json", {**body, "sha256": digest(body)})
    return body


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else: what is stale in a set gets deleted, so it must be a set."""
    try:
        visible = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
        if not visible:
            return
        with contextlib.suppress(SetError):  # none, or a damaged one: then its cases tell
            if read_json(out / "manifest.json", SetError).get("format") == FORMAT:
                return
            visible.add("another program's manifest.json")
        if visible <= {"manifest.json", "cases"} and all(map(_is_case, (out / "cases").iterdir())):
            return
    except OSError as error:
        raise OutputError(f"{out} cannot be used: {error.strerror or error}. Name another folder.") from error
    raise OutputError(f"{out} exists and is no prepared set; name another folder.")


def _is_case(folder: Path) -> bool:
    """Whether a folder is one of ours: nothing in it that `prepare` did not write."""
    ours = (*ARRAYS, "case.json")
    return folder.is_dir() and all(p.name in ours or p.name.startswith(".") for p in folder.iterdir())


def _each(
    found: list[StudyFiles], out: Path, workers: int, registered: bool
) -> Iterator[tuple[StudyFiles, dict[str, Any] | str]]:
    """Prepare each study, in this process or in several; yields in the order in which they finish."""
    if workers <= 1:
        yield from ((study, prepare_case(study, out, registered)) for study in found)
        return
    with ProcessPoolExecutor(min(workers, len(found)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(prepare_case, study, out, registered): study for study in found}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare_case(files: StudyFiles, out: Path, registered: bool = False) -> dict[str, Any] | str:
    """Prepare one study; returns what case.json says, or the reason for refusing it.

    Raises:
        OutputError: the set cannot be written, which no other study would survive either.
    """
    try:
        signature = _signature(files, registered)
        folder = out / "cases" / files.case
        known = _finished(folder, signature)
        if known is not None:
            return known
        return _write_case(load_study(files, registered=registered), files, signature, folder)
    except OutputError:
        raise
    except CrossmrError as error:
        return str(error)
    except OSError as error:
        raise OutputError(f"{out} could not be written: {error.strerror or error}. Name another folder.") from error


def _finished(folder: Path, signature: str) -> dict[str, Any] | None:
    """What case.json says, if it is of these very files and both arrays are whole; else None."""
    try:
        known = read_json(folder / "case.json", SetError)
        if known.get("signature") != signature:
            return None
        for name in ARRAYS:
            np.lib.format.open_memmap(folder / name, mode="r")
    except (SetError, OSError, ValueError):
        return None
    return known


def _signature(files: StudyFiles, registered: bool) -> str:
    """Changes when a file of the study does, or what it is taken for, or this format."""
    label = files.label()
    stats = []
    for role, path in (*files.images().items(), *([] if label is None else [("seg", label)])):
        try:
            stat = path.stat()
        except OSError as error:
            raise VolumeError(
                f"{files.case}: {path} cannot be read ({error.strerror}). Check the path and permissions."
            ) from error
        stats.append((role, path.name, stat.st_size, stat.st_mtime_ns))
    how = {"registered": True} if registered else {}
    return digest({"version": FORMAT_VERSION, "margin": MARGIN, "files": sorted(stats), **how})


def _write_case(study: Study, files: StudyFiles, signature: str, folder: Path) -> dict[str, Any]:
    z, y, x = box = study.box(MARGIN)
    modalities = list(study.volumes)
    images = np.stack([study.normalised(m, box) for m in modalities], axis=1).astype(np.float16)
    labels = np.zeros_like(study.mask, np.uint8) if study.labels is None else study.labels
    masks = np.stack([study.mask[box].astype(np.uint8), labels[box]], axis=1)
    (folder / "case.json").unlink(missing_ok=True)
    written = {
        "images.npy": _write_array(folder / "images.npy", images),
        "masks.npy": _write_array(folder / "masks.npy", masks),
    }
    case = {
        "patient": study.patient,
        "modalities": modalities,
        "shape": list(study.mask.shape),
        "spacing_mm": [round(float(s), 6) for s in study.reference.spacing_mm],
        "box": [[s.start, s.stop] for s in (z, y, x)],
        "masked_background": study.masked_background,
        "labelled": study.labels is not None,
        "notes": list(study.notes),
        "normalisation": {m: {"low": n.low, "high": n.high} for m, n in study.normalisation.items()},
        "statistics": {m: _statistics(images[:, i], masks[:, 0] > 0) for i, m in enumerate(modalities)},
        "head_voxels": [int(n) for n in (masks[:, 0] > 0).sum((1, 2))],
        "inputs": {path.name: content_sha256(path) for path in files.images().values()},
        "files": written,
        "signature": signature,
    }
    write_json(folder / "case.json", case)
    return case


def _statistics(image: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean and deviation within the head of one normalised modality."""
    inside = image[mask].astype(np.float32)
    return {"mean": round(float(inside.mean()), 6), "std": round(float(inside.std()), 6)}


def _write_array(path: Path, array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    content = buffer.getvalue()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def _fingerprint(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the cohort looks like, in a few readable numbers."""
    modalities = sorted({m for case in cases.values() for m in case["modalities"]})
    patterns: dict[str, int] = {}
    for case in cases.values():
        key = "+".join(case["modalities"])
        patterns[key] = patterns.get(key, 0) + 1
    shapes = [case["shape"] for case in cases.values()]
    spacings = [case["spacing_mm"] for case in cases.values()]
    statistic = {
        m: {
            key: round(statistics.fmean(c["statistics"][m][key] for c in cases.values() if m in c["statistics"]), 6)
            for key in ("mean", "std")
        }
        for m in modalities
    }
    return {
        "studies": len(cases),
        "patients": len({case["patient"] for case in cases.values()}),
        "modalities": {m: sum(m in case["modalities"] for case in cases.values()) for m in modalities},
        "patterns": dict(sorted(patterns.items())),
        "shape_zyx": {
            "min": [min(s) for s in zip(*shapes, strict=True)],
            "max": [max(s) for s in zip(*shapes, strict=True)],
        },
        "spacing_mm_zyx": {
            "min": [min(s) for s in zip(*spacings, strict=True)],
            "median": [statistics.median(s) for s in zip(*spacings, strict=True)],
            "max": [max(s) for s in zip(*spacings, strict=True)],
        },
        "masked_background": sum(case["masked_background"] for case in cases.values()),
        "labelled": sum(case["labelled"] for case in cases.values()),
        "intensity": statistic,
    }


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
