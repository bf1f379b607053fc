"""Which contrast an MR series is: recognised from its acquisition, or, where the tags do not tell, its description.

Times are in ms. The limits lie between the times that brain protocols use at 1.5 and 3 T. Series between the limits are
recognised by their description; series that neither tells are left out, with the reason.
"""

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

_NOT_ANATOMY = {
    "LOCALIZER": "a localiser",
    "ADC": "a diffusion map",
    "FA": "a diffusion map",
    "TRACEW": "a diffusion image",
    "DIFFUSION": "a diffusion image",
    "PERFUSION": "a perfusion image",
    "ASL": "a perfusion image",
    "CBF": "a perfusion map",
    "CBV": "a perfusion map",
    "MTT": "a perfusion map",
    "FMRI": "a functional image",
    "T2_STAR": "weighted by T2*",
    "T1 MAP": "a map of relaxation times",
    "T2 MAP": "a map of relaxation times",
    "P": "a phase image",
    "PHASE": "a phase image",
    "PHASE MAP": "a phase image",
    "VELOCITY": "a flow image",
    "MIP": "a projection",
    "MINIP": "a projection",
    "MNIP": "a projection",
    "PROJECTION IMAGE": "a projection",
    "MAX_IP": "a projection",
    "MIN_IP": "a projection",
    "SUB": "a subtraction",
    "SUBTRACTION": "a subtraction",
    "SUBTRACT": "a subtraction",
    "TOF": "an angiogram",
    "SWI": "weighted by susceptibility",
    "REAL": "part of a complex image",
    "IMAGINARY": "part of a complex image",
    "SCREEN SAVE": "a picture of a screen",
}
"""Value of Image Type → what such an image is; none of them is a contrast that crossmr uses."""

_ACQUIRED = {"T1": "t1n", "T2": "t2w", "FLUID_ATTENUATED": "t2f", "PROTON_DENSITY": "pdw"}
"""Acquisition Contrast of enhanced images (DICOM PS3.3 C.8.13.3.1)."""

_NO_AGENT = re.compile(
    r"\s*(no[nt]?\b.*|none.*|nil|nein|kein.*|n\.?/?a?\.?|0+(\.0+)?( ?ml)?|-+|false|unknown|without.*|w/?o.*|"
    r"ohne.*|sans.*|native?|unenhanced|pre.*)?\s*",
    re.I,
)
_WORD = {
    "not": r"locs?|\w*locali[sz]er\w*|\w*scout\w*|\w*survey\w*|(sense|coil)-?ref\w*|b1-?map\w*|3-?plane|tof|mra|mrv|"
    r"angio\w*|swi\w*|swan|venobold|dwi|dti|adc|trace\w*|diff\w*|ep2d|epi|perf\w*|dsc|dce|asl|pcasl|fmri|bold|field|"
    r"fieldmap|b0|b1|spectro\w*|svs|csi|mip|minip|sub|subtr\w*|t2star|hemo|ciss|fiesta|phase|pha|qsm|cal|calib\w*|"
    r"shim\w*|smartbrain|stir|dir",
    "t2f": r"flair|t2flair|tirm|darkfluid|dark-?fluid|fluid",
    "t1n": r"t1w?|t1n|mprage|mpr|bravo|fspgr|spgr|ir-?fspgr|tfe|vibe|thrive|lava|mp2rage|ffe|st1\w*|t1-\w+",
    "t2w": r"t2w?|st2\w*|t2-\w+",
    "pdw": r"pdw?|proton",
    "agent": r"gd|gad\w*|post(c\w*|g\w*|km|inj\w*)?|ce|km|kontrast\w*|contrast\w*|dotarem|multihance|enh\w*|pc|"
    r"inj\w*|apres",
    "plain": r"pre|nativ?e?|ohne|sans|without|wo|w-o|noncon\w*|unenh\w*|plain|before|avant",
}
_WITHOUT = "non|no|not|vor|before|pre|ohne|sans|wo|without|avant"
_AGENTS = r"contrast\w*|kontrast\w*|gad\w*|gd|km|ce|agent|inj\w*"
_PATTERNS = {key: re.compile(rf"(?:{words})\Z") for key, words in _WORD.items()}


@dataclass(frozen=True)
class Acquisition:
    """The tags that tell contrasts apart, None or empty where they are missing."""

    families: frozenset[str] = frozenset()
    """Scanning Sequence: SE, IR, GR, EP, RM."""
    variants: frozenset[str] = frozenset()
    """Sequence Variant: SK, SP, MP, SS, ..."""
    tr_ms: float | None = None
    te_ms: float | None = None
    ti_ms: float | None = None
    agent: bool | None = None
    """Whether a contrast agent is named; None where the tags are missing or empty."""
    acquired: str = ""
    """Acquisition Contrast of enhanced images."""
    kinds: frozenset[str] = frozenset()
    """Values of Image Type, and of Frame Type."""
    angiography: bool = False
    diffusion: bool = False
    """A b-value above zero."""
    description: str = ""
    """Series description, or protocol name."""


class Verdict(NamedTuple):
    """The contrast of a series, and how it was recognised."""

    modality: str | None
    """t1n, t1c, t2w, t2f, pdw; None for anything else."""
    why: str
    """The tags that decided, or why it is left out; never words of the description, which may name the patient."""
    by_tags: bool
    """Whether its tags decided, not its description."""


def names_agent(text: str) -> bool | None:
    """Whether the text of Contrast/Bolus Agent names one; None of empty text."""
    text = text.strip()
    return None if not text else _NO_AGENT.fullmatch(text) is None


def recognise_contrast(acquisition: Acquisition) -> Verdict:
    """The contrast of a series, or the reason for leaving it out."""
    words = _meanings(acquisition.description)
    for kind in sorted(acquisition.kinds & _NOT_ANATOMY.keys()):
        return Verdict(None, _NOT_ANATOMY[kind], True)
    if acquisition.diffusion or acquisition.acquired == "DIFFUSION":
        return Verdict(None, "a diffusion image", True)
    if acquisition.angiography or acquisition.acquired in ("TOF", "FLOW_ENCODED"):
        return Verdict(None, "an angiogram", True)
    if "EP" in acquisition.families and "t2f" not in words:
        return Verdict(None, "echo-planar: diffusion, perfusion or function", True)
    if "not" in words and "t2f" not in words:
        return Verdict(None, "none of T1, T2, FLAIR and PD by its description", False)
    modality, why = _by_tags(acquisition)
    by_tags = modality is not None
    if not by_tags:
        if why:
            return Verdict(None, why, True)
        modality = next((m for m in ("t2f", "pdw", "t2w", "t1n") if m in words), None)
        if "t1n" in words and modality == "t2w":
            modality = None  # the description names both
        if modality is None:
            return Verdict(
                None, f"neither its tags ({_timing(acquisition)}) nor its description tell its contrast", False
            )
        why = "its description"
    if modality == "t1n":
        enhanced, evidence = _enhanced(acquisition, words)
        return Verdict("t1c" if enhanced else "t1n", f"{why}; {evidence}", by_tags)
    return Verdict(modality, why, by_tags)


def _by_tags(acquisition: Acquisition) -> tuple[str | None, str]:
    """The contrast by the tags, t1n for any T1; or None and the reason, which is empty where tags are missing."""
    if acquisition.acquired in _ACQUIRED:
        return _ACQUIRED[acquisition.acquired], f"acquisition contrast {acquisition.acquired}"
    tr, te, families = acquisition.tr_ms, acquisition.te_ms, acquisition.families
    ti = acquisition.ti_ms or None  # 0 where nothing was inverted
    why = _timing(acquisition)
    if ti is not None and ti >= 1500 and "GR" not in families and (te is None or te >= 60):
        return "t2f", why
    if "GR" in families and "SE" not in families:
        if "SS" in acquisition.variants and not acquisition.variants & {"SP", "MP"}:
            return None, f"balanced steady state ({why})"
        if te is not None and te >= 12:
            return None, f"weighted by T2* ({why})"
        return ("t1n", why) if te is not None and te <= 8 and (tr is not None or ti is not None) else (None, "")
    if not families or tr is None or te is None:
        return None, ""
    if ti is not None and ti < 300:
        return None, f"short inversion time ({why})"
    if te <= 40 and (tr <= 1300 or (ti is not None and ti <= 1300 and tr <= 3500)):
        return "t1n", why
    if tr >= 1800 and te >= 60 and ti is None:
        return "t2w", why
    if tr >= 1800 and te <= 40 and ti is None:
        return "pdw", why
    return None, ""


def _enhanced(acquisition: Acquisition, words: Collection[str]) -> tuple[bool, str]:
    """Whether a T1 was acquired with contrast agent, and the evidence."""
    if acquisition.agent is not None and not (acquisition.agent and "plain" in words and "agent" not in words):
        return acquisition.agent, "contrast agent named" if acquisition.agent else "no contrast agent by its tag"
    if "agent" in words and "plain" not in words:
        return True, "contrast agent by its description"
    if acquisition.agent:  # the tag is of the whole examination; the description says that this series was before it
        return False, "before the contrast agent, by its description"
    return False, "no contrast agent named"


def _timing(acquisition: Acquisition) -> str:
    """Sequence and times as text."""
    numbers = {"TR": acquisition.tr_ms, "TE": acquisition.te_ms, "TI": acquisition.ti_ms}
    times = [f"{name} {value:g} ms" for name, value in numbers.items() if value is not None]
    return ", ".join(["/".join(sorted(acquisition.families)) or "no sequence", *times])


def _meanings(description: str) -> frozenset[str]:
    """The keys of `_WORD` whose patterns a word, or two adjacent words, of the description match."""
    text = description.lower().replace("t2*", "t2star").replace("w/o", "wo")
    text = re.sub(r"\+c\b|\bc\+", " gd ", text)
    text = re.sub(r"[^a-z0-9]+", " ", text)
    text = re.sub(r"\bpost ?op\w*", " ", text)
    text = re.sub(rf"\b({_WITHOUT}) ?({_AGENTS})\b", " unenhanced ", text)
    text = re.sub(r"\bt1(ce|gd|c|km|post\w*)\b", "t1 gd", text)
    words = text.split()
    terms = words + [f"{a}-{b}" for a, b in itertools.pairwise(words)]
    return frozenset(key for key, pattern in _PATTERNS.items() if any(pattern.match(term) for term in terms))
