"""On whom a model was trained: a list of hashes beside it, patients.json, which tells whoever has a patient already.

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
Part = Literal["train", "val"]


@dataclass(frozen=True)
class PatientList:
    """The patients of one training, as hashes; without a salt it is unknown who they were."""

    salt: str = ""
    """32 hexadecimal digits."""
    train: tuple[str, ...] = ()
    """Those that the networks learnt from."""
    val: tuple[str, ...] = ()
    """Those on whom training was validated and standard deviations were calibrated."""


def names_of(patient: str, scans: Iterable[str]) -> list[str]:
    """All that a patient can be recognised by: the name, and the SHA-256 of the voxels of each scan."""
    return [f"patient {patient}", *(f"scan {scan}" for scan in scans)]


def remember(train: Iterable[str], val: Iterable[str]) -> PatientList:
    """The list of a training, under a new salt; `train` and `val` as `names_of` returns them."""
    salt = secrets.token_hex(16)
    return PatientList(salt, *(tuple(sorted(_hashed(salt, names).values())) for names in (train, val)))


def find(lists: Sequence[PatientList], studies: Mapping[str, Sequence[str]]) -> dict[str, Part]:
    """Which of some studies a model has seen, and in which part; the training part counts where both have them.

    Args:
        lists: the model's.
        studies: case → `names_of` its patient and scans.
    """
    found: dict[str, Part] = {}
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
