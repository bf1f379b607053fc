"""Which contrast an MR series is: recognised from its acquisition, or, where the tags do not tell, its description.

Times are in ms. The limits lie between the times that brain protocols use at 1.5 and 3 T. Series between the limits are
recognised by their description; series that neither tells are left out, with the reason.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from crossmr.data.contrast_agent import Said, folded, plain, said_of_agent, spaced
from crossmr.data.naming import display_name

LEAST_FLIP = 8.0
"""A spoiled gradient echo of a smaller flip angle, in degrees, is weighted by proton density, unless it is prepared."""
LEAST_ECHO_MS = 0.3
"""Shorter echoes show bone, and correct the attenuation of PET."""
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
    "ANGIO": "an angiogram",
    "PCA": "a flow image",
    "M_PCA": "a flow image",
    "PHASE CONTRAST M": "a flow image",
    "FAT": "the fat of a Dixon acquisition",
    "F": "the fat of a Dixon acquisition",
    "FAT_FRACTION": "the fat of a Dixon acquisition",
    "FAT_PER_PCT": "the fat of a Dixon acquisition",
    "OPP_PHASE": "the opposed phase of a Dixon acquisition",
    "OUT_PHASE": "the opposed phase of a Dixon acquisition",
    "OUT_OF_PHASE": "the opposed phase of a Dixon acquisition",
    "OPPOSED_PHASE": "the opposed phase of a Dixon acquisition",
    "OP": "the opposed phase of a Dixon acquisition",
    "INV1": "one inversion of an MP2RAGE, not its UNI",
    "INV2": "one inversion of an MP2RAGE, not its UNI",
}
"""Value of Image Type → what such an image is; none of them is a contrast that crossmr uses."""

_ACQUIRED = {"T1": "t1n", "T2": "t2w", "FLUID_ATTENUATED": "t2f", "PROTON_DENSITY": "pdw"}
"""Acquisition Contrast of enhanced images (DICOM PS3.3 C.8.13.3.1)."""

_NOT_WORDS = {
    "a localiser or a calibration": r"locs?|\w*locali[sz]er\w*|\w*scout\w*|\w*survey\w*|(sense|coil)-?ref\w*|"
    r"b1-?map\w*|3-?plane|cal|calib\w*|shim\w*|smartbrain|b0|b1|posdisp|ref-?(?:head|body|brain|scan\w*|coil\w*)",
    "an angiogram": r"\w*tof\d?|mra\w*|mrv\w*|\w*angio\w*|willis|venogr\w*|arteriogr\w*|inhance|"
    r"trance|twist|tricks|4d-trak|cemr[av]|pcmr\w*|pc-mr\w*|[23]d-?pc|pc-?[23]d|pca|venc\w*|qiss",
    "an image of vessels": r"cow|carotid\w*|venous|arter\w*|phase-contrast",
    "a flow image": r"\w*flow|4d-?flow|fluss|flusso|flujo",
    "weighted by susceptibility": r"swi\w*|swan|venobold|qsm|t2-?star(?:w|map\w*)?|\w*hemo|hemosid\w*|hemoflash\w*|"
    r"megre|gre-?me|me-?gre|multi-?echo-?gre|multiecho|medic|merge|"
    r"t2-(?:gre|ffe|fl2d)|gre-t2",
    "a diffusion image": r"\w*dwi|[esi]?dti|(?:[deis]|av)?adc|trace\w*|diff\w*|ep2d|epi|noddi|hardi|"
    r"b-?[1-9]\d{1,3}|fractional|aniso\w*",
    "a perfusion image": r"perf\w*|dsc|dce|asl|pcasl",
    "a perfusion map": r"k-?trans\w*|iauc\w*|wash-?(?:in|out)|(?:r|rel-?)?cb[vf]|r?mtt|t-?max|pbp",
    "a map of perfusion": r"kep|v[ep]|auc|ttp|pei",
    "one of several times": r"dyn\w*|time-?resolved|zeitaufgel\w*",
    "a functional image": r"fmri|bold",
    "a spectrum": r"spectro\w*|svs|csi",
    "a projection or a subtraction": r"mi?n?ip|subtr\w*",
    "a subtraction": r"sub",
    "a mask": r"\w*mask|\w*overlay|(?:lesion|neuro)quant-(?:overlay|report|seg\w*|colou?r\w*|results?)",
    "a map": r"maps?",
    "balanced steady state": r"ciss|fiesta|drive|truefisp|trufi",
    "a phase image or a field map": r"phase|pha|phs|field|field-?map\w*|\w+fieldmap\w*",
    "of short or double inversion": r"stir|dir|double-?ir|double-inv\w*",
    "an inversion recovery that keeps the sign": r"psir|phase-sens\w*",
    "one inversion of an MP2RAGE, not its UNI": r"inv-?[12]",
    "an image with white matter nulled": r"\w*fgatir\w*|wmn|wmn-?mprage|wm-?null\w*|white-matter-null\w*|wmnull\w*",
    "a map of relaxation times": r"q?t[12]-?map(?:s|ping)?|r2star|r[12]-?maps?|mp2rage-t1-images|q-?map\w*|qt[12]|"
    r"t1-?rho\w*",
    "a FLAIR weighted by T2*, too": r"flair-?star",
    "synthetic: computed from another acquisition": r"symri|magic|synthetic\w*|synth",
}
"""What a series is → the words of the description, or adjacent words joined by -, that say so; none is one of ours."""
_HARMLESS = re.compile(
    r"\b(?:(?:pre|post|peri|intra) ?op\w*|(?:large|full|wide|big|small|low|high|bias) field|field (?:of view|strength)|"
    r"v ?p ?shunt\w*|shunt\w* ?v ?p|flow ?comp\w*|\d+ ?grad|sub ?(?:\d+ ?)*m(?:m|illi\w*)|"
    r"phase ?(?:rl|lr|ap|pa|hf|fh|is|si|swap\w*|enc\w*|over\w*))\b"
)
"""Words that say how or when a series was acquired, of which a part would say that it is none of ours; folded."""
_SPIN_ECHO_TRAIN = re.compile(r"\b(?:tse|fse|frfse|space|cube|vista)\b")
"""Where one is named, "epi" is epilepsy, and "drive" but a pulse at the train's end."""
_T2_GRADIENT_ECHO = re.compile(r"\bt2\w*\b.*\b(?:gre|grad|gradient|ffe|fl[23]d)\b|\b(?:gre|grad|gradient) .*\bt2\b")
_CALIBRATION = re.compile(r"asset(?: cal\w*)?(?: \d+)?")
"""Whole descriptions; in others the word means parallel imaging."""
_SYNTHETIC = "synthetic: computed from another acquisition"
_PROTON_DENSITY = "weighted by proton density"
_MAPPED_TIMES, _LOCALISER, _DIFFUSION = "a map of relaxation times", "a localiser or a calibration", "a diffusion image"
_MAPS = frozenset({"a map", "a map of perfusion"})
"""What short words say that mean something else of an original image that is called a contrast: VE, VP, MAP."""
_COMPUTED = _MAPS | {"a projection or a subtraction", "a subtraction", "a mask", "a perfusion map"}
"""What a word may say that is true of derived images alone."""
_OF_FUNCTION = frozenset({"a perfusion image", "a functional image"})
_OF_VESSELS = frozenset({"an angiogram", "a flow image", "weighted by susceptibility"})
"""What is always acquired by gradient echoes without preparation."""
_WHATEVER_TAGS = frozenset(
    {
        *("fat or opposed phase of a Dixon acquisition", "one inversion of an MP2RAGE, not its UNI", _MAPPED_TIMES),
        *("an image with white matter nulled", "an inversion recovery that keeps the sign"),
        *("of short or double inversion", "a FLAIR weighted by T2*, too"),
    }
)
"""What tags cannot deny: such series have the tags of the contrast that they are made of."""
_NO_T1 = frozenset(
    {
        *("an image of vessels", "a diffusion image", "a perfusion image", "a functional image", "a spectrum"),
        *_OF_VESSELS,
    }
)
"""What is never acquired by a spin echo, or an inverted gradient echo, with the times of a T1."""
_OF_FLAIR = frozenset({"a projection or a subtraction", "a mask", "a map", "a FLAIR weighted by T2*, too", _SYNTHETIC})
"""What words say of a FLAIR, too; others say when it was acquired, or for what: FLAIR EPI."""
_WITH_AGENT = frozenset({"a perfusion image", "a perfusion map", "a map of perfusion", "one of several times"})
"""What is mostly acquired with contrast agent."""
_DIXON = re.compile(
    r"\b(?:dixon|mdixon|ideal|flex|vibe|lava|thrive)\b.*"
    r"\b(?:f|fat|opp|op|out|opposed|outphase|outofphase|ff)\b(?! ?(?:s\b|sat|sup))|"
    r"^(?:fat|outphase|out phase|opp phase|opposed phase|out of phase)\b(?! ?(?:sat|sup))|"
    r"\b(?:opposed|opp|out of|out) ?phase\b"
)
"""The fat or opposed phase of a Dixon acquisition, by a folded description."""

_OTHER_PARTS = re.compile(
    r"[ctl]-?spine|[cdl]spine|\w*spinal?|spine|neck|cuello|collo|pescoco|knee|hip|abdomen|liver|pelvis|shoulder|breast|heart|cardiac|prostate|ankle|"
    r"wrist|elbow|hand|foot|chest|thorax|[hbl]ws|wirbelsaeule|wirbelsaule|rachis|columna|coluna|colonna|lumbar|cervical\w*|"
    r"thoracic|dorsal|kregoslup|позвоночник"
)
_OTHER_PARTS_IN_WORDS = re.compile(r"c-?sp|hals|carotid\w*")
"""The same in a description alone: an examination of brain and carotids may have the latter in Body Part Examined."""
_PARTS_OF_HEAD = re.compile(
    r"sell[ae]\w*|orbit\w*|pituit\w*|hypoph\w*|hipof\w*|ipof\w*|iacs?|iam|kgh|tmj|cpa|facial?|face|temporal|petrous|felsenbein|"
    r"sinus\w*|nnh|optic\w*|cavernous|augen|tempor\w*|hippo\w*|trigem\w*|skull-?base|peaux|гипофиз\w*|орбит\w*"
)
_WORD = {
    "t2f": r"flair|t2flair|\w*flair|tirm|darkfluid|dark-?fluid|fluid",
    "t1": r"t1w?|t1n|st1\w*|t1-\w+",
    "t1n": r"t1w?|t1n|mprage|memprage|mpr|bravo|fspgr|spgr|ir-?fspgr|tfe|vibe|thrive|lava|mp2rage|ffe|st1\w*|t1-\w+",
    "t2w": r"t2w?|st2\w*|t2-\w+",
    "pdw": r"pdw?|proton",
    "uni": r"uni|uniden|uni-den|uni-images",
    "prepared": r"mprage|memprage|mpr|bravo|tfe|tfl\w*|ir-?fspgr|mp2rage",
}
_PATTERNS = {key: re.compile(rf"(?:{words})\Z") for key, words in _WORD.items()}
_NOT_PATTERNS = {what: re.compile(rf"(?:{words})\Z") for what, words in _NOT_WORDS.items()}


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
    unclear: bool = False
    """Whether Contrast/Bolus Agent holds a word that is neither a known agent nor a placeholder."""
    acquired: str = ""
    """Acquisition Contrast of enhanced images."""
    kinds: frozenset[str] = frozenset()
    """Values of Image Type, and of Frame Type."""
    angiography: bool = False
    diffusion: bool = False
    """A b-value above zero."""
    times: int = 1
    """Number of Temporal Positions."""
    echoes: int = 1
    """Echo times of the series that it is a part of."""
    flip_degrees: float | None = None
    """Flip Angle."""
    before: Literal["", "order", "words"] = ""
    """By what it was taken for acquired before the agent, where every series names one: `resolve_agents`."""
    part: str = ""
    """Body Part Examined."""
    description: str = ""
    """Series description, or protocol name."""


Reason = Literal["", "decided", "unclear", "denied", "directions", "few slices", "slices missing", "one place"]
"""Why a series is left out: by the user, or by what it is; as nothing tells its contrast; as one word or tag says that
it is none, and the rest that it is one; by where its slices lie."""


class Recognition(NamedTuple):
    """The contrast of a series, and how it was recognised."""

    modality: str | None
    """t1n, t1c, t2w, t2f, pdw; None for anything else."""
    why: str
    """The tags that decided, or why it is left out; never words of the description, which may name the patient."""
    reason: Reason = ""
    """Why it is left out, where more depends on that."""
    may_be: frozenset[str] = frozenset()
    """The contrasts that it is by all that is known of it but one word of its description, or its flip angle."""


def resolve_agents(acquisitions: Sequence[Acquisition]) -> list[Acquisition]:
    """The acquisitions of one study, in the order of time, with what their agents' tags mean beside each other.

    A word that is no known agent is one where other series lack it. An agent that every series names was typed in for
    the examination: a T1 before the one whose description names the agent was acquired without it, and where no
    description does, a T1 before the first T2, FLAIR or PD that another T1 follows. Words that may mean something else
    than an agent, or its denial, count against the tag where the tags tell no T1 apart.
    """
    bare = [recognise_contrast(replace(a, agent=None)).modality for a in acquisitions]
    known = [k for k, modality in enumerate(bare) if modality is not None]
    if not all(acquisitions[k].unclear for k in known):
        acquisitions = [replace(a, agent=True, unclear=False) if a.unclear else a for a in acquisitions]
    everywhere = len(known) > 1 and all(acquisitions[k].agent for k in known)
    t1 = [k for k in known if bare[k] in ("t1n", "t1c")]
    said = {k: said_of_agent(acquisitions[k].description) for k in t1}
    resolved = list(acquisitions)
    for k in t1:
        tag = acquisitions[k].agent
        alike = any(bool(acquisitions[j].agent) is bool(tag) and said[j].agent is not said[k].agent for j in t1)
        if said[k].contradicts(tag) and (alike or (tag and everywhere)):
            resolved[k] = replace(acquisitions[k], agent=None)
    others = [k for k in known if k not in t1]
    if len(t1) < 2 or not others or not everywhere:
        return resolved
    by_words = any(words.agent for words in said.values())
    if by_words:
        first = min(k for k in t1 if said[k].agent)
    elif any(words.agent is False for words in said.values()):
        return resolved
    else:
        first = next((k for k in others if t1[0] < k < t1[-1]), t1[0])
    for k in t1:
        if k < first and said[k].agent is None:
            resolved[k] = replace(acquisitions[k], agent=None, before="words" if by_words else "order")
    return resolved


def recognise_contrast(acquisition: Acquisition) -> Recognition:
    """The contrast of a series, or the reason for leaving it out."""
    words = _meanings(acquisition.description)
    if what := _none_of_ours(acquisition, words):
        return Recognition(None, what)
    if "crossmr" in acquisition.description.lower() and f"not: {_SYNTHETIC}" in words:
        return Recognition(None, "itself synthetic", "decided")
    modality, why = _by_tags(acquisition, words)
    by_tags = modality is not None
    if modality is None and not why:
        modality = _by_words(acquisition, words)
        why = "its description"
        if modality is None:
            why = f"neither its tags ({_timing(acquisition)}) nor its description tell its contrast"
    if modality == "t1n":
        enhanced, evidence = _enhanced(acquisition, said_of_agent(acquisition.description))
        modality, why = "t1c" if enhanced else "t1n", f"{why}; {evidence}"
    if denials := _denials(acquisition, words, by_tags=by_tags):
        return _denied(denials, modality, acquisition, words, by_tags=by_tags)
    return Recognition(modality, why, "unclear" if why.startswith("neither") else "")


def _by_words(acquisition: Acquisition, words: Collection[str]) -> str | None:
    """The contrast that a description names, t1n for any T1; None where it names none, or two."""
    modality = next((m for m in ("t2f", "pdw", "t2w", "t1n") if m in words), None)
    if {"t1", "t2f"} <= {*words} and "t2w" not in words and (acquisition.te_ms or 0) <= 40:
        return "t1n"  # a T1-FLAIR
    return None if "t1n" in words and modality == "t2w" else modality


def _denials(acquisition: Acquisition, words: Collection[str], *, by_tags: bool) -> list[str]:
    """What words, Image Type or flip angle say that a series is instead of a contrast, the surest first."""
    kinds = acquisition.kinds - {""}
    if "SYNTHETIC" in kinds:
        return [_SYNTHETIC]
    found = [word.removeprefix("not: ") for word in words if word.startswith("not: ")]
    found = [what for what in found if "t2f" not in words or what in _OF_FLAIR]
    if kinds and "DERIVED" not in kinds and not {*_ACQUIRED.values()}.isdisjoint(words):
        found = [what for what in found if what not in _MAPS]
    if by_tags:
        found = [what for what in found if not _cannot_be(what, acquisition, words)]
    found.sort(key=lambda what: (what not in _WHATEVER_TAGS, what in _NO_T1, what))
    return [*found, _PROTON_DENSITY] if by_tags and _of_small_flip(acquisition, words) else found


def _cannot_be(denial: str, acquisition: Acquisition, words: Collection[str]) -> bool:
    """Whether a series that is called T1 is acquired as what a word says never is: AX T1 POST PERF."""
    families, variants = acquisition.families, acquisition.variants
    spin_echo = "SE" in families and not families & {"GR", "EP"}
    prepared = "GR" in families and (acquisition.ti_ms or "MP" in variants)
    is_t1 = "t1n" in words and "t2w" not in words and (acquisition.te_ms or 0) <= 40
    return denial in _NO_T1 and is_t1 and bool(spin_echo or prepared) and "DERIVED" not in acquisition.kinds


def _denied(
    denials: Sequence[str], modality: str | None, acquisition: Acquisition, words: Collection[str], *, by_tags: bool
) -> Recognition:
    """A series that a word or a tag says to be none of the contrasts: in doubt where all else says that it is one."""
    settled = [what for what in denials if _agrees(what, modality, acquisition, words, by_tags=by_tags)]
    denial = [*settled, *denials][0]
    said = "by its description"
    if denial == _PROTON_DENSITY:
        said = f"by its flip angle of {acquisition.flip_degrees:g}° without preparation"
    elif denial == _SYNTHETIC and "SYNTHETIC" in acquisition.kinds:
        said = "by its image type"
    if modality is None or settled:
        return Recognition(None, f"{denial}, {said}")
    unknown = modality == "t1n" and acquisition.agent is None and denial in _WITH_AGENT
    may_be = frozenset({"t1n", "t1c"} if unknown else {modality})
    other = "all else" if denial == _PROTON_DENSITY else "its tags" if by_tags else "it, too"
    rest = "" if denial == _SYNTHETIC else f", and {display_name(modality)} by {other}"
    return Recognition(None, f"{denial}, {said}{rest}", "denied", may_be)


def _agrees(
    denial: str, modality: str | None, acquisition: Acquisition, words: Collection[str], *, by_tags: bool
) -> bool:
    """Whether what else is known of a series agrees with what a word or a tag says that it is instead of a contrast."""
    gradient = acquisition.families & {"GR", "SE"} == {"GR"}
    unprepared = gradient and not (acquisition.ti_ms or "MP" in acquisition.variants)
    if denial == _SYNTHETIC or denial in _WHATEVER_TAGS:
        return denial != _SYNTHETIC
    if denial == _PROTON_DENSITY:
        return modality != "t1c" and "t1" not in words
    if (denial in _COMPUTED and "DERIVED" in acquisition.kinds) or (
        denial in _OF_VESSELS and (unprepared or not by_tags) and "t1" not in words
    ):
        return True
    if {"t1c": "t1n"}.get(modality or "", modality) in words:
        return False
    if gradient:
        return unprepared or denial in _OF_VESSELS or denial == _LOCALISER
    if denial in (_LOCALISER, *_OF_FUNCTION):
        return True
    return denial == _DIFFUSION and modality == "t2w"  # some scanners call its spin echo so, not echo-planar


def _none_of_ours(acquisition: Acquisition, words: Collection[str]) -> str:
    """Why a series is nothing that crossmr uses by its tags, whatever its times are; '' where it may be."""
    if what := no_anatomy(acquisition.kinds):
        return what
    if acquisition.diffusion or acquisition.acquired == "DIFFUSION":
        return "a diffusion image"
    if acquisition.angiography or acquisition.acquired in ("TOF", "FLOW_ENCODED"):
        return "an angiogram"
    if "EP" in acquisition.families and "t2f" not in words:
        return "echo-planar: diffusion, perfusion or function"
    return "one of several times" if acquisition.times > 1 else ""


def _by_tags(acquisition: Acquisition, words: Collection[str]) -> tuple[str | None, str]:
    """The contrast by the tags, t1n for any T1; or None and the reason, which is empty where tags do not tell.

    `words`, what the description says, decides where the times are those of two contrasts.
    """
    if acquisition.acquired in _ACQUIRED:
        return _ACQUIRED[acquisition.acquired], f"acquisition contrast {acquisition.acquired}"
    tr, te, families = acquisition.tr_ms, acquisition.te_ms, acquisition.families
    ti = acquisition.ti_ms or None  # 0 where nothing was inverted
    why = _timing(acquisition)
    if ti is not None and ti >= 1500 and "GR" not in families and (te is None or te >= 60):
        return "t2f", why
    if "GR" in families and "SE" not in families:
        return _by_gradient_echo(acquisition, words)
    if not families or tr is None or te is None:
        return None, ""
    if ti is not None and ti < 300:
        return None, f"short inversion time ({why})"
    research = "RM" in families and not families & {"SE", "IR"}
    if research and "t2w" in words and "t1n" not in words and ti is None and te <= 40 and tr < 1800:
        return None, f"called T2, with the times of a T1 or of one weighted by T2* ({why})"
    if te <= 40 and (tr <= 1300 or (ti is not None and ti <= 1300 and tr <= 3500)):
        return "t1n", why
    if ti is not None or tr < 1800:
        return None, ""
    if "IR" in families:  # inverted, but the time is missing
        if te >= 60 and tr >= 4000 and ("t2f" in words or "t2w" not in words):
            return "t2f", why
        return (None, "") if "t2f" in words or "t1n" in words else (None, f"inverted, without inversion time ({why})")
    if te >= 60:
        return ("t2f", f"{why}; FLAIR by its description") if "t2f" in words and tr >= 4000 else ("t2w", why)
    return ("pdw", why) if te <= 40 else (None, "")


def _by_gradient_echo(acquisition: Acquisition, words: Collection[str]) -> tuple[str | None, str]:
    """As `_by_tags`, of a gradient echo: t1n, or why not."""
    tr, te, ti, variants = acquisition.tr_ms, acquisition.te_ms, acquisition.ti_ms or None, acquisition.variants
    why = _timing(acquisition)
    if "SS" in variants and not variants & {"SP", "MP"}:
        return None, f"balanced steady state ({why})"
    if te is not None and te >= 12:
        return None, f"weighted by T2* ({why})"
    if te is None or te > 8 or (tr is None and ti is None):
        return None, ""
    uni = "uni" in words or "UNI" in acquisition.kinds
    if ti is not None and tr is not None and not uni:
        if 300 <= ti <= 550 and tr >= 1500:
            return None, f"an image with white matter nulled, by its inversion time ({why})"
        if ti >= 1500 or tr >= 4000:
            return None, f"one inversion of an MP2RAGE, not its UNI ({why})"
    if acquisition.echoes > 2 and ti is None and "MP" not in variants:
        return None, f"one of {acquisition.echoes} gradient echoes ({why})"
    if not _is_prepared(acquisition, words) and 0 < te < LEAST_ECHO_MS:
        return None, f"an image of short echo, as of bone ({why})"
    if ti is None and tr is not None and 14 <= tr <= 60 and "MP" not in variants and "t1n" not in words:
        return None, f"an angiogram or a susceptibility image by its times ({why}), and not called T1"
    return "t1n", why


def _is_prepared(acquisition: Acquisition, words: Collection[str]) -> bool:
    """Whether a gradient echo is prepared by an inversion, as an MPRAGE is."""
    told = acquisition.ti_ms or "MP" in acquisition.variants or "prepared" in words
    return bool(told) or (acquisition.tr_ms or 0) >= 1000


def _of_small_flip(acquisition: Acquisition, words: Collection[str]) -> bool:
    """Whether a series is a gradient echo whose flip angle is too small for a T1."""
    gradient = (
        "GR" in acquisition.families and "SE" not in acquisition.families and acquisition.acquired not in _ACQUIRED
    )
    return gradient and not _is_prepared(acquisition, words) and 0 < (acquisition.flip_degrees or 0) < LEAST_FLIP


def _enhanced(acquisition: Acquisition, said: Said) -> tuple[bool, str]:
    """Whether a T1 was acquired with contrast agent, by its tag and by what its description says, and the evidence."""
    against = ", against its description" if said.contradicts(acquisition.agent) else ""
    if acquisition.agent and said.surely is False:  # the tag is of the whole examination
        return False, "before the contrast agent, by its description"
    if acquisition.agent:
        return True, f"contrast agent named{against}"
    if acquisition.agent is False and not said.surely:
        return False, f"no contrast agent by its tag{against}"
    if said.agent:
        against = ", against its tag" if acquisition.agent is False else ""
        return True, f"contrast agent by its description{against}"
    if acquisition.before:
        why = "plain by order" if acquisition.before == "order" else "before the one whose description names it"
        return False, f"agent named on every series; {why}"
    return False, "no contrast agent named"


def _timing(acquisition: Acquisition) -> str:
    """Sequence and times as text."""
    numbers = {"TR": acquisition.tr_ms, "TE": acquisition.te_ms, "TI": acquisition.ti_ms}
    times = [f"{name} {value:g} ms" for name, value in numbers.items() if value is not None]
    return ", ".join(["/".join(sorted(acquisition.families)) or "no sequence", *times])


def means(kinds: Collection[str]) -> frozenset[str]:
    """The values of Image Type that say what an image shows; the others tell how it was corrected or stored."""
    return frozenset(kinds) & (_NOT_ANATOMY.keys() | {"W", "WATER", "IP", "IN_PHASE", "UNI"})


def names(description: str, modality: str) -> bool:
    """Whether a description names a contrast, T1 for T1ce."""
    return {"t1c": "t1n"}.get(modality, modality) in _meanings(description)


def no_anatomy(kinds: Collection[str]) -> str:
    """What values of Image Type say that an image shows instead of anatomy; '' where they say nothing of that kind."""
    return next((_NOT_ANATOMY[kind] for kind in sorted(kinds) if kind in _NOT_ANATOMY), "")


def covers(part: str, description: str) -> int:
    """What of the head a series shows, by its words: 2 the whole (or no word), 1 a part of it, 0 another body part.

    The description counts more than Body Part Examined, which is often that of the whole examination.
    """
    whole = re.compile(
        "brain|head|kopf|schadel|schaedel|hirn|gehirn|cerebro|cerebral|craneo|cranio|crane|encephale|encefalo|cerveau|hjerne|hoofd"
    )
    for text in (description, part):
        words = folded(text).split()
        terms = [*words, *("-".join(pair) for pair in itertools.pairwise(words))]
        if any(whole.fullmatch(term) for term in terms):
            return 2
        if any(_PARTS_OF_HEAD.fullmatch(term) for term in terms):
            return 1
        if any(_OTHER_PARTS.fullmatch(term) for term in terms):
            return 0
        if text is description and any(_OTHER_PARTS_IN_WORDS.fullmatch(term) for term in terms):
            return 0
    return 2


def _meanings(description: str) -> frozenset[str]:
    """Keys of `_WORD`, and what else the description says that a series is: values of `_NOT_WORDS`, after "not: "."""
    text = _HARMLESS.sub(" ", spaced(plain(description).replace("t2*", "t2star").replace("flair*", "flairstar")))
    if _SPIN_ECHO_TRAIN.search(text):
        text = re.sub(r"\b(?:epi|drive)\b", " ", text)
    words = text.split()
    terms = [*words, *("-".join(pair) for pair in itertools.pairwise(words))]
    terms += ["-".join(three) for three in zip(words, words[1:], words[2:], strict=False)]
    found = {key for key, pattern in _PATTERNS.items() if any(pattern.match(term) for term in terms)}
    found |= {f"not: {what}" for what, pattern in _NOT_PATTERNS.items() if any(pattern.match(term) for term in terms)}
    if _T2_GRADIENT_ECHO.search(text) and not _SPIN_ECHO_TRAIN.search(text):
        found.add("not: weighted by susceptibility")
    if _CALIBRATION.fullmatch(text):
        found.add("not: a localiser or a calibration")
    if _DIXON.search(text):
        found = {f for f in found if not f.startswith("not: a phase")} | {
            "not: fat or opposed phase of a Dixon acquisition"
        }
    elif re.search(r"\bin ?phase\b", text):
        found -= {"not: a phase image or a field map"}
    return frozenset(found)
