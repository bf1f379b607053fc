"""Patterns by which a user says which files or series are a contrast: --map, `mapping`."""

import fnmatch
import re

from crossmr.data.bids import case_of
from crossmr.data.words import CONTRASTS, SEPARATORS, spelt
from crossmr.errors import ConfigError


def alternatives(glob: str) -> list[str]:
    """The patterns of one contrast in a mapping: `*_MPRAGE.nii.gz|*_BRAVO.nii.gz`; `[|]` is the character itself.

    Raises:
        ConfigError: it is no text.
    """
    if not isinstance(glob, str):
        raise ConfigError(f"mapping: {glob!r} is no pattern; expected one, or several as '*_MPRAGE*|*_BRAVO*'.")
    return re.split(r"(?<!\[)\|", glob)


def mapping_key(key: str) -> str:
    """The canonical name that a key of a mapping stands for.

    Raises:
        ConfigError: a key that cannot name a modality.
    """
    meaning = spelt(key.lower())
    if meaning or re.fullmatch(r"[a-z0-9]+", key):
        return meaning or key
    raise ConfigError(
        f"mapping: {key!r} cannot name a modality: expected one of {', '.join(CONTRASTS)}, 'seg', "
        "or a new name in lower-case letters and digits, such as swi."
    )


def case_by_glob(name: str, glob: str) -> str:
    """The case of a file that matches a pattern: what its leading `*` stands for; else ''."""
    if not glob.startswith("*"):
        return ""
    match = re.match("(.*?)" + fnmatch.translate(glob[1:]), name, re.DOTALL)
    return case_of(match[1].rstrip(SEPARATORS)) if match else ""
