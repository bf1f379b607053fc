"""How an output is laid out.

labelled   OUT/CASE/CASE-t2f_synthetic.nii.gz and its _std; manifests, pictures and report beside them
challenge  OUT/CASE-t2f.nii.gz and nothing else, as BraSyn wants it; the records in OUT_records
bids       a BIDS derivative: OUT/sub-X[/ses-Y]/anat/sub-X[_ses-Y]_desc-synthetic_FLAIR.nii.gz; records in OUT/crossmr
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from crossmr.data.bids import ROOT as BIDS_ROOT
from crossmr.data.bids import dataset_of
from crossmr.data.volume import Volume, describe_grid
from crossmr.errors import ConfigError, OutputError, StudyError
from crossmr.files import digest, locked, read_json, write_atomically, write_json

FORMAT = "crossmr-completion"
"""What the manifests of a completed study and of a cohort say they are."""
EXPECTED = ("t1n", "t1c", "t2w", "t2f")
"""A complete study; the manifest says which of these a model cannot fill."""
Profile = Literal["labelled", "challenge", "bids"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
CHALLENGE_GRID = "240×240×155 at 1×1×1 mm"
BIDS_VERSION = "1.10.0"
PICTURES = "pictures"
"""The folder of the records that holds one picture per case."""
SUFFIXES = {"t1n": "T1w", "t1c": "T1w", "t2w": "T2w", "t2f": "FLAIR", "pdw": "PDw"}


@dataclass(frozen=True)
class Layout:
    """Where what is written goes."""

    out: Path
    profile: Profile = "labelled"

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ConfigError(f"--profile is '{self.profile}'; expected one of {', '.join(PROFILES)}.")

    @property
    def records(self) -> Path:
        """The folder of manifests, pictures and report."""
        out = self.out.resolve() if self.out.name in ("", "..") else self.out  # such as '.', which has no name
        return {
            "labelled": self.out,
            "challenge": out.parent / f"{out.name}_records",
            "bids": self.out / "crossmr",
        }[self.profile]

    @contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Lock the output folder, and that of the records where it lies elsewhere; see `files.locked`."""
        with locked(self.out, shared=shared):
            if self.profile == "challenge":
                with locked(self.records, shared=shared):
                    yield
            else:
                yield

    def folder(self, case: str) -> Path:
        """The folder of a case's manifest."""
        return self.records / case

    def image(self, case: str, modality: str) -> Path:
        """Where a synthetic volume goes."""
        if self.profile == "challenge":
            return self.out / f"{case}-{modality}.nii.gz"
        return self._bids(case, modality, "") if self.profile == "bids" else self._labelled(case, modality, "synthetic")

    def std(self, case: str, modality: str) -> Path | None:
        """Where its standard deviation goes; None where none is wanted."""
        if self.profile == "challenge":
            return None
        return self._bids(case, modality, "std") if self.profile == "bids" else self._labelled(case, modality, "std")

    def sidecar(self, image: Path) -> Path:
        """Where the metadata of a volume go."""
        return image.with_name(image.name.replace(".nii.gz", ".json"))

    def picture(self, case: str) -> Path:
        """Where a case's picture goes."""
        return self.records / PICTURES / f"{case}.webp"

    def dicom(self, case: str, modality: str, kind: str = "") -> Path:
        """Where the folder of a derived DICOM series goes: beside the manifest, in every profile."""
        return self.folder(case) / f"{case}-{modality}_synthetic{kind}_dicom"

    def gone(self, case: str, manifest: Mapping[str, Any]) -> list[str]:
        """The names of what a case's manifest says was written, and is not there any more."""
        folder, stds, written = self.folder(case), bool(manifest.get("std")), list[Path]()
        for modality, entry in manifest.get("synthetic", {}).items():
            written += [folder / entry[key] for key in ("file", "std", "dicom") if entry.get(key)]
            written += [self.dicom(case, modality, "std")] if stds and entry.get("dicom") else []
        return [path.name for path in written if not os.path.exists(os.path.normpath(path))]

    def _labelled(self, case: str, modality: str, what: str) -> Path:
        return self.out / case / f"{case}-{modality}_{what}.nii.gz"

    def _bids(self, case: str, modality: str, what: str) -> Path:
        if modality not in SUFFIXES:
            raise StudyError(f"{case}: BIDS has no name for {modality}. Use --profile labelled and another OUT.")
        entities = bids_entities(case)
        enhanced = "_ce-gadolinium" if modality == "t1c" else ""
        name = f"{'_'.join(entities)}{enhanced}_desc-synthetic{what}_{SUFFIXES[modality]}.nii.gz"
        return self.out.joinpath(*entities, "anat", name)

    def clashes(self, cases: Sequence[str]) -> dict[str, str]:
        """Cases whose volumes would replace one another's, or those of another case in OUT, and why.

        Of several new ones all are named, so that none depends on the order.
        """
        if self.profile != "bids":
            return {}
        called: dict[str, set[str]] = {}
        for case in cases:
            called.setdefault(bids_name(case), set()).add(case)
        there = self._finished() - {*cases}
        for case in there:
            if (name := bids_name(case)) in called:
                called[name].add(case)
        return {
            case: f"{case}: BIDS has one name for it and {' and '.join(sorted(same - {case}))}, {name}. "
            f"Rename them, or use {'' if same & there else '--profile labelled and '}another OUT."
            for name, same in called.items()
            for case in sorted(same - there)
            if len(same) > 1
        }

    def _finished(self) -> set[str]:
        """The cases that have a manifest in OUT.

        Raises:
            OutputError: it cannot be listed.
        """
        try:
            with os.scandir(self.records) as entries:
                return {entry.name for entry in entries if os.path.exists(os.path.join(entry.path, "manifest.json"))}
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise OutputError(f"{self.records} cannot be listed ({error.strerror}). Check its permissions.") from error

    def why_taken(self, case: str) -> str:
        """Why a case has no place of its own in OUT, by what others have written by now; '' if it has one."""
        if self.profile != "bids" or (self.folder(case) / "manifest.json").exists():
            return ""
        return self.clashes([case]).get(case, "") if self.image(case, "t1n").parent.exists() else ""

    def check(self, case: str, reference: Volume) -> None:
        """Refuse a study that the profile has no place for, by the volume on whose grid it is.

        Raises:
            StudyError: 'challenge', and this is not BraTS' grid.
        """
        if self.profile == "challenge" and (grid := describe_grid(reference)) != CHALLENGE_GRID:
            raise StudyError(
                f"{case}: is {grid}, but BraSyn's are {CHALLENGE_GRID}. Use --profile labelled and another OUT."
            )

    def start(self, scans: Path) -> None:
        """Write what stands at the head of the output."""
        if self.profile != "bids":
            return
        raw = self._raw(scans)
        write_json(
            self.out / "dataset_description.json",
            {
                "Name": "Synthetic MRI by crossmr",
                "BIDSVersion": BIDS_VERSION,
                "DatasetType": "derivative",
                **_generated(),
                **({"DatasetLinks": {"raw": f"{raw}/"}} if raw else {}),
            },
        )
        for name, content in BIDS_HEAD.items():
            if not os.path.lexists(self.out / name):
                write_atomically(self.out / name, content)

    def finish(self, case: str, manifest: Mapping[str, Any], scans: Path, inputs: Sequence[Path]) -> list[Path]:
        """Write what stands beside a case's volumes; returns it."""
        if self.profile != "bids":
            return []
        written = []
        for modality, entry in manifest["synthetic"].items():
            image, std = self.image(case, modality), self.std(case, modality)
            sources = _sources(scans, inputs) if self._raw(scans) else []
            common = {"SkullStripped": manifest["skull_stripped"], **_generated()}
            common |= {"Sources": sources} if sources else {}
            fields = {"Description": " ".join(entry["warnings"]), "Units": "arbitrary", **common}
            written.append(self._write_sidecar(image, fields))
            if entry["std"] and std is not None:
                what = f"Standard deviation of the error of {image.name}, on its scale: {manifest['std']['of']}"
                written.append(self._write_sidecar(std, {"Description": what, "Units": "arbitrary", **common}))
        return written

    def _write_sidecar(self, image: Path, fields: Mapping[str, Any]) -> Path:
        path = self.sidecar(image)
        write_json(path, fields)
        return path

    def _raw(self, scans: Path) -> str | None:
        """The way from OUT to the BIDS dataset of the scans, if OUT lies in it; any other way would name folders."""
        dataset, out = dataset_of(scans.resolve()), self.out.resolve()
        return _relative(dataset, out) if (dataset / BIDS_ROOT).exists() and dataset in out.parents else None


def bids_entities(case: str) -> tuple[str, ...]:
    """`sub-X` and, where the case has one, `ses-Y`, which OASIS-3 writes `sess-Y`."""
    match = re.fullmatch(r"(sub-[A-Za-z0-9+]+)(?:_(ses-[A-Za-z0-9+]+))?", case.replace("_sess-", "_ses-"))
    if match is None:
        return (f"sub-{re.sub('[^A-Za-z0-9]', '', case) or digest(case)[:10]}",)
    return tuple(part for part in match.groups() if part)


def bids_name(case: str) -> str:
    """What BIDS calls a case: `sub-X[_ses-Y]`; one whose name has no letter or digit of ASCII gets a hash."""
    return "_".join(bids_entities(case))


def records_of(out: Path) -> Path:
    """The records of an output of any profile."""
    places = [Layout(out, profile).records for profile in PROFILES]
    return next((place for place in places if (place / "manifest.json").exists()), out)


def _sources(scans: Path, inputs: Sequence[Path]) -> list[str]:
    """The BIDS URIs of these files in the dataset of `scans`, by their names there, wherever they link to."""
    dataset, place = dataset_of(scans.resolve()), Path(os.path.abspath(scans))
    inside = [_relative(scans.resolve() / os.path.relpath(path, place), dataset) for path in inputs]
    return [f"bids:raw:{name}" for name in inside if not name.startswith("../")]


def _relative(path: Path, start: Path) -> str:
    return os.path.relpath(path, start).replace(os.sep, "/")


def is_generated(path: Path) -> bool:
    """Whether a JSON file of a BIDS dataset says that crossmr, and nothing else, generated it."""
    generators = read_json(path, OutputError).get("GeneratedBy") if path.is_file() else None
    if not (isinstance(generators, list) and len(generators) == 1 and isinstance(generators[0], dict)):
        return False
    return bool(generators[0].get("Name") == "crossmr")


def _generated() -> dict[str, Any]:
    return {"GeneratedBy": [{"Name": "crossmr", "Version": version("crossmr")}]}


_README = """Synthetic MRI
=============

Every image here was made by crossmr, a program that synthesises contrasts which were not acquired. None of them is a
scan. Research use only; not a medical device. Contrast enhancement cannot in general be inferred from unenhanced
images: enhancement seen, or not seen, in a synthetic T1w with contrast is no finding.

desc-synthetic     the image, float32 on the scale that its manifest states
desc-syntheticstd  how far each voxel may be off, a standard deviation on that scale
crossmr/           manifests with inputs, hashes, model and settings; pictures; report.html
"""

BIDS_HEAD = {".bidsignore": b"crossmr\n", "README": _README.encode()}
"""What a derivative has beside dataset_description.json; one that is there already stays."""
