"""On whom a model was trained: counts in its record, and a list of hashes beside it, patients.json.

Whoever has a patient's name or scan can ask the list whether that patient was used; nobody else learns who was.

A hash is salted, with another salt for every training, and slow, so that nobody finds patients by trying all names or
record numbers: one try costs some 5 ms of a processor, a check of a thousand patients seconds, all record numbers of
eight digits six days. It is of a patient's name, or of the voxels of a scan, which are the same under any name.

The list is not a part of a model's identity: without it a model has the same SHA-256 and works the same.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from crossmr.config import from_dict
from crossmr.errors import ConfigError, ModelError
from crossmr.files import digest, read_json, write_json
from crossmr.paths import PATIENTS

FILE = PATIENTS
FORMAT, FORMAT_VERSION = "crossmr-patients", 1
COST = 2**11
"""scrypt's n, with r = 8 and p = 1: memory of 2 MiB and some 5 ms."""
LENGTH = 8
"""Bytes of a hash."""
PHANTOM = "PHANTOM-"
"""What the names of crossmr's phantoms begin with."""
WITH_SKULL, WITHOUT_SKULL = "with_skull", "without_skull"


@dataclass(frozen=True)
class PatientList:
    """The patients of one training, as hashes; without a salt it is unknown who they were."""

    salt: str = ""
    """32 hexadecimal digits."""
    train: tuple[str, ...] = ()
    """Those that the networks learnt from."""
    val: tuple[str, ...] = ()
    """Those on whom training was validated and standard deviations were calibrated."""


def count_seen(studies: Iterable[tuple[str, Sequence[str], bool]]) -> dict[str, Any]:
    """What the record of a training says of its studies; each is (name, modalities, whether without skull).

    'studies', and how many of them are 'without_skull'; and in 'contrasts', with_skull or without_skull → modality →
    how many patients had it. Phantoms are no patients, and count there only where a model saw nothing else.
    """
    known = list(studies)
    patients = [study for study in known if not study[0].startswith(PHANTOM)] or known
    modalities = sorted({m for _, had, _ in known for m in had})

    def count(modality: str, *, without_skull: bool) -> int:
        return sum(modality in had and without == without_skull for _, had, without in patients)

    contrasts = {
        WITH_SKULL: {m: count(m, without_skull=False) for m in modalities},
        WITHOUT_SKULL: {m: count(m, without_skull=True) for m in modalities},
    }
    return {"studies": len(known), WITHOUT_SKULL: sum(study[2] for study in known), "contrasts": contrasts}


def is_seen(record: Any) -> bool:
    """Whether what a model's record says of its studies are such counts, as far as it says anything."""
    if not isinstance(record, dict) or not isinstance(parts := record.get("contrasts", {}), dict):
        return False
    counts = [record.get("studies", 0), record.get(WITHOUT_SKULL, 0)]
    if parts and not all(isinstance(parts.get(part), dict) for part in (WITH_SKULL, WITHOUT_SKULL)):
        return False
    return all(isinstance(count, int) for count in (*counts, *(n for part in parts.values() for n in part.values())))


def add_seen(own: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a training and of the model that it started from; per contrast only where both are known."""
    total = {key: own[key] + earlier.get(key, 0) for key in ("studies", WITHOUT_SKULL)}
    if "contrasts" not in earlier:
        return total
    parts = {part: {**earlier["contrasts"][part], **own["contrasts"][part]} for part in (WITH_SKULL, WITHOUT_SKULL)}
    summed = {
        part: {m: sum(one["contrasts"][part].get(m, 0) for one in (own, earlier)) for m in modalities}
        for part, modalities in parts.items()
    }
    return {**total, "contrasts": summed}


def is_learnt(seen: Mapping[str, Any], modality: str, *, without_skull: bool) -> bool:
    """Whether a model had a contrast of any patient whose skull is there, or not there, as far as its record says."""
    counts = seen.get("contrasts", {}).get(WITHOUT_SKULL if without_skull else WITH_SKULL)
    return counts is None or counts.get(modality, 0) > 0


def names_of(patient: str, scans: Iterable[str]) -> list[str]:
    """All that a patient can be recognised by: the name, and the SHA-256 of the voxels of each scan."""
    return [f"patient {patient}", *(f"scan {scan}" for scan in scans)]


def remember(train: Iterable[str], val: Iterable[str]) -> PatientList:
    """The list of a training, under a new salt; `train` and `val` as `names_of` returns them."""
    salt = secrets.token_hex(16)
    return PatientList(salt, *(tuple(sorted(_hashed(salt, names).values())) for names in (train, val)))


def find(lists: Sequence[PatientList], studies: Mapping[str, Sequence[str]]) -> dict[str, Literal["train", "val"]]:
    """Which of some studies a model has seen, and in which part; the training part counts where both have them.

    Args:
        lists: the model's.
        studies: case → `names_of` its patient and scans.
    """
    found: dict[str, Literal["train", "val"]] = {}
    for one in lists:
        train, val = set(one.train), set(one.val)
        hashes = _hashed(one.salt, [name for names in studies.values() for name in names]) if train or val else {}
        for case, names in studies.items():
            own = {hashes[name] for name in names if name in hashes}
            if own & train:
                found[case] = "train"
            elif own & val:
                found.setdefault(case, "val")
    return found


def write_list(folder: Path, lists: Sequence[PatientList]) -> None:
    """Write the list beside a model; those of the models that it started from come after its own."""
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, "trainings": [asdict(one) for one in lists]}
    write_json(folder / FILE, {**body, "sha256": digest(body)})


def read_list(folder: Path) -> tuple[PatientList, ...]:
    """The list beside a model; empty where there is none.

    Raises:
        ModelError: it is damaged, or another program's.
    """
    path = folder / FILE
    if not os.path.exists(path):
        return ()
    body: dict[str, Any] = read_json(path)
    intact = body.pop("sha256", None) == digest(body)
    if not intact or (body.get("format"), body.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ModelError(f"{path} was changed or damaged, or is of another version. Copy it again, or delete it.")
    try:
        return tuple(from_dict(PatientList, one) for one in body["trainings"])
    except (ConfigError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a list of patients ({error}). Copy it again, or delete it.") from error


def _hashed(salt: str, names: Iterable[str]) -> dict[str, str]:
    """Each name's hash, on all processors: scrypt lets other threads run."""

    def slow(name: str) -> str:
        content = name.encode(errors="surrogatepass")
        return hashlib.scrypt(content, salt=salt.encode(), n=COST, r=8, p=1, dklen=LENGTH).hex()

    different = list(dict.fromkeys(names))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(different, pool.map(slow, different), strict=True))
