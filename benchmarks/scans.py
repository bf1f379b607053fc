"""The development scans: unpacked, split, which cohort a case is of, and small networks to train on them."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossmr.data.patients import SPLITS
from crossmr.files import digest, write_json

COHORTS = {
    "BraTS": ("Brats18_", "BraTS2021_", "BraTS-GLI", "BraTSReg", "CompImg", "modelhub", "TCGA-DU-7294", "TCGA-FG-6692"),
    "BraTS-Africa": ("BraTS-SSA",),
    "openms": ("patient",),
    "LGG": ("TCGA-",),
    "phantoms": ("PHANTOM",),
}
"""How the cases of each are called; the first that fits counts."""
IN_WHOLE = {
    "TCGA-CS-4942": "BraTS2021_01476",
    "TCGA-CS-4944": "BraTS2021_01477",
    "TCGA-CS-6665": "BraTS2021_01483",
    "TCGA-CS-6668": "BraTS2021_01485",
    "TCGA-DU-7008": "CompImg_example",
    "TCGA-DU-A5TR": "Brats18_TCIA10_628_1",
    "TCGA-DU-A5TW": "Brats18_TCIA10_639_1",
    "TCGA-FG-6692": "TCGA-FG-6692",
}
"""LGG patients who are among the whole studies too, under which name. All but the last found by affine registration of
the BraTS 2013, 2021, 2023 and low-grade studies to every LGG patient: these correlate by .70 to .91 within the brain,
the next best pairs by .50 at most."""

SECOND_VISITS = {
    "BraTSReg_002_01_0262": "BraTSReg_002_00_0000",
    "BraTS-SSA-00121-000": "BraTS-SSA-00115-000",
    "BraTS-SSA-00081-000": "BraTS-SSA-00076-000",
}
"""Second study of a patient → the first one."""
SMALL = {
    "crop": "128,128",
    "representation.channels": "12",
    "representation.multipliers": "1,2,3,4",
    "representation.patch_size": "8",
    "distribution.width": "256",
    "distribution.blocks": "4",
    "synthesis.channels": "16",
    "synthesis.multipliers": "1,2,3,4",
}
"""Settings of networks that two processor cores can train."""


def patient_of(case: str) -> str:
    """The patient of a case, by the name of the first visit."""
    return SECOND_VISITS.get(case, case)


def cohort_of(case: str) -> str:
    """The cohort that a case belongs to."""
    return next(cohort for cohort, starts in COHORTS.items() if case.startswith(starts))


def write_set(folder: Path, like: Mapping[str, Any], cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of a prepared set of these cases, each with its part, otherwise like another set's."""
    patients = {case["patient"]: case["part"] for case in cases.values()}
    by_part = {part: sorted(p for p, own in patients.items() if own == part) for part in SPLITS}
    manifest = {**like, "cases": dict(cases), "split": {"sha256": digest(patients), **by_part}}
    write_json(folder / "manifest.json", {**manifest, "sha256": digest(manifest)})


def lgg(data: Path) -> list[Path]:
    """The LGG patients who are not among the whole studies."""
    return [folder for folder in sorted((data / "lgg").iterdir()) if folder.name not in IN_WHOLE]


def unpacked(data: Path, out: Path, cases: tuple[str, ...] = ()) -> Path:
    """The packed whole studies of these names, or all, as NIfTI under `out`."""
    spec = importlib.util.spec_from_file_location("unpack", data / "unpack.py")
    if spec is None or spec.loader is None or not (data / "whole").is_dir():
        raise SystemExit(f"{data} has no whole/ and unpack.py; name the folder of the scans.")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    for path in sorted((data / "whole").glob("*.npz")):
        if not cases or path.stem in cases:
            unpack.write(path, out)
    return out
