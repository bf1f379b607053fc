"""What the words of a file's or folder's name say: contrast, agent, sequence, plane, step, copy, space, mask.

A name is cut into words, and a word that is glued together (`3DT1GADO`, `rFLAIR`) into the pieces of `_VOCABULARY`. The
name is read from its end for as long as each word has a role and no second contrast comes (`T1_FLAIR` and `T2_FLAIR`
are one contrast each); the text before is the `head`, which names the patient. `naming.recognise` states the rules.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from crossmr.data.visits import trailing_visit

CONTRASTS = ("t1n", "t1c", "t2w", "t2f", "pdw")
"""Names of the contrasts: T1, T1ce, T2, FLAIR, PD."""
SEPARATORS = "-_. "
"""What stands between the words of a name."""
LABEL, OTHER = "label", ""
"""Meanings that are no contrast: a segmentation of a disease, and whatever is unknown or no anatomical image."""

Doubt = Literal["", "visit", "agent", "number"]

_VOCABULARY = {
    ("contrast", "t1"): "t1 t1w",
    ("contrast", "t1n"): "t1n",
    ("contrast", "t1c"): "t1c ct1",
    ("contrast", "t2"): "t2 t2w",
    ("contrast", "flair"): "flair fluid darkfluid",
    ("contrast", "t2f"): "t2f",
    ("contrast", "pd"): "pd pdw dp",
    ("agent", "with"): "ce gd gad gado gadolinium post postcontrast postgd postgad contrast enhanced ks c "
    "km mitkm kontrast kontrastmittel contraste contrasto gadolinio mdc injection injected gadovist gadavist magnevist "
    "dotarem multihance prohance omniscan clariscan elucirem vueway",
    ("agent", "without"): "pre precontrast noncontrast nocontrast nogd nogad unenhanced nativ native ohnekm plain",
    ("denial", ""): "without wo no non ohne sans sin sem senza bez zonder utan uden",
    ("filler", ""): "with mit avec con com iv agent medium",
    ("sequence", "t1"): "mprage rage bravo spgr fspgr mpr vibe flash",
    ("sequence", ""): "2d 3d tse fse frfse tfe ffe ir cube vista space blade propeller tfl se gre fs iso mp 1mm 2mm "
    "3mm thin thick tirm spc dark haste hires hr fat sat fatsat fatsup supp suppressed fl2d fl3d p2 p3 p4",
    ("plane", "ax"): "ax axial tra trans transverse",
    ("plane", "sag"): "sag sagittal",
    ("plane", "cor"): "cor coronal",
    ("step", ""): "bet hdbet synthstrip stripped skullstripped skullstrip unstripped strip n4 bfc unbiased corrected "
    "biascorrected corr norm normalized normalised denoised noise reduced defaced deface cropped crop preproc "
    "preprocessed processed pp orig original raw native final nii lin linear nonlin nonlinear affine rigid conform "
    "reoriented extracted std masked copy r2s",
    ("raw", ""): "raw orig original native",
    ("registered", ""): "r reg registered coreg coregistered aligned resampled resliced warped r2s",
    ("link", ""): "to 2 in on onto into",
    ("space", ""): "mni mni152 mni305 sri24 sri atlas template standard middle common icbm",
    (
        "mask",
        "",
    ): "seg segm segmentation segmentations dseg label labels lesion lesions mask masks msk roi tumor tumour "
    "gtv wmh consensus gt truth ground",
    (
        "origin",
        "auto",
    ): "automated automatic auto approx pred predicted prediction synth synthetic synthesized synthesised generated",
    ("origin", ""): "manual expert",
    ("tissue", ""): "brain skull head parenchyma wm gm csf tissue brainmask",
    ("other", ""): "dwi adc swi asl dti dsc dce bold cbf cbv mtt tof mra map star t2star qsm",
    ("noise", ""): "mr mri image img series nifti data files scans folder",
}
"""(role, value) → the words that have it, in lower case."""

_ROLES: dict[str, list[tuple[str, str]]] = {}
for _role, _words in _VOCABULARY.items():
    for _one in _words.split():
        _ROLES.setdefault(_one, []).append(_role)

_HINTS = {
    "t1": r".*(?<![a-z]r)t1.*|mprage|mpr|mp2rage|.*spgr|vibe|tfe|flash|unit1|orig|nu|norm|rawavg",
    "t2w": r".*t2(?!star|\*|s$).*",
    "t2f": r".*flair.*|tirm|.*darkfluid.*|spair",
    "pdw": r"pdt2|proton.*",
    "with": r".*(gd|gado?).*|.*t1w?(c(?!or)|post|km|\+).*|km|kontrast.*|contrast.*|post(?!op).*|enh.*|inj.*|apres|con|"
    r"mit|avec",
    "without": r"nativ?e?|plain|unenh.*|non?con.*|ohne|sans|sin|sem|zonder|without|wo|uten|utan",
    "copy": r"n4.*|bias|ss|skull.*|noreg|res|nu|norm|rawavg",
    "mask": r"mask.*|.*mask|seg.*|.*segm?|.*segmentation.*|label.*|lesion.*|tumou?r.*",
    "none": r"aparc.*|parc.*|ribbon|wm.*|pve.*|"
    r"prob.*|filled|.*field.*|warp.*|xfm|transform.*|jacobian.*|displacement.*|deformation.*|synth.*|pred.*|generated|"
    r"ct|pet|suv.*|dose|spect|dwi.*|e?adc.*|fa|md|ad|rd|l[123]|b\d+|bvals?|trace.*|colfa|dki|noddi|hardi|diff.*|swi.*|swan|venobold|"
    r"phase|pha|magnitude|t2star.*|t2s|t2\*|r[12](star)?|t[12]map|.*locali[sz]er.*|loc|scout.*|survey.*|mi?n?ip|tof.*|"
    r"mrv|angio.*|bold.*|rest|func|fmri|epi.*|ep2d.*|sbref|p?c?asl.*|rcb[fv]|tmax|ttp|ktrans|perf.*|dsc.*|dce.*|ph|psr|"
    r"mrs|csi|svs|spectro.*|stir|dir|ciss|fiesta|cest|apt.*|mtr|inv\d*|subtr.*|atlas.*",
}
"""What words that have no role hint at, whole words in lower case; see `possible_contrasts`."""
_HINTS_OF = {hint: re.compile(words) for hint, words in _HINTS.items()}
_HINTS_BY_ROLE = {
    ("contrast", "t1"): ("t1",),
    ("contrast", "t1n"): ("t1", "without"),
    ("contrast", "t1c"): ("t1", "with"),
    ("contrast", "pd"): ("pdw",),
    ("contrast", "t2"): ("t2w",),
    ("contrast", "t2f"): ("t2f",),
    ("contrast", "flair"): ("t2f",),
    ("sequence", "t1"): ("t1",),
    ("agent", "with"): ("with",),
    ("agent", "without"): ("without",),
}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NEVER_GLUED = _set(
    "c to in on mp gt r mr star map img data no non wo sin sem con com iv mit with hr fat sat p2 p3 p4 bez dark fluid "
    "plain synth synthetic synthesized synthesised generated"
)
_ONLY_AFTER = _set(
    "c se ir fs iso ks mp pp r2s raw final std in on km hr fat sat p2 p3 p4 no non wo sin sem con com iv mit with "
    "plain agent medium mdc bez"
)
"""Words that count only after the contrast: before it they may be somebody's initials."""
_STRIPPING = _set("bet hdbet synthstrip strip stripped skullstrip skullstripped extracted")
"""Steps whose mask is of the brain: `T1_bet_mask`, but `T1_bet_seg` may be of a lesion."""
_KINDS = frozenset(["seg", "segm", "segmentation", "segmentations", "mask", "masks", "labels"])
_FORM_ROLES = _set("step space registered raw tissue noise sequence plane")
_TEMPLATE = re.compile(r"(mni|icbm|sri)\d*(a?n?lin)?\w{0,8}|[a-z]*\d(\.\d)?t")
"""A space, or a strength of the field: MNI152NLin2009, GE3T."""
_FORM = re.compile(
    r"(raw|source)data|sources?|proc|derived|derivatives?|registration|smooth(ed)?|resi[sz]ed|(down|up)sampled|"
    r"(re)?scaled|z?scored?|padded|interpolated|isotropic|harmoni[sz]ed|anonymi[sz]ed|filtered|full|completed|backup|"
    r"imgs?|images?(tr|ts)?|labels(tr|ts)|niis?|niftis?|scans?|data|datasets?|sets?|cohorts?|volumes?|vols?|imaging|sites?|cent(er|re)s?|"
    r"hospitals?|clinics?|groups?|batch|\d+mm"
)
"""Words of folders of one cohort in some form, beside those of `_VOCABULARY`; and such as tell no cohorts apart."""
_WORD = re.compile(r"[^-_. ()\[\]+,]+")
_ARCHIVE = re.compile(r"VSD\.Brain(_\dmore)?\.XX\.[A-Z]\.(?=(MR|OT)\b|(MR|OT)_)", re.IGNORECASE)
"""How names of the Virtual Skeleton Database begin (BraTS 2013 to 2015, ISLES 2015): the same for every patient."""
_TIME = re.compile(r"(19|20)\d{12}")
"""Day and time of a scan, as dcm2niix writes them."""
_AGENT_OR_VISIT = re.compile(r"(pre|post)(\d{1,2})?")
_GE_WITHOUT = re.compile(r"(?<![a-z])c-(?=[-_. ]|$)", re.IGNORECASE)


class Piece(NamedTuple):
    """A part of a word, and what it may be."""

    text: str
    roles: tuple[tuple[str, str], ...]

    def value(self, role: str) -> str | None:
        """Its value in a role, None where it has another."""
        return next((value for name, value in self.roles if name == role), None)


class Word(NamedTuple):
    """A word of a name: its place in it, and its pieces, none where it has no role."""

    text: str
    start: int
    pieces: tuple[Piece, ...]

    def has(self, *roles: str) -> bool:
        """Whether a piece of it has one of these roles."""
        return any(role in roles for piece in self.pieces for role, _ in piece.roles)


@dataclass(frozen=True)
class Reading:
    """What a name says."""

    head: str = ""
    """The text before the words that have a role: the case, or nothing."""
    visit: str = ""
    """The time point that stands after the contrast: `FLAIR_baseline`."""
    meaning: str = OTHER
    """A modality, `LABEL` or `OTHER`."""
    mask: bool = False
    """Whether it is a mask of any kind: of a lesion, of the brain, of a tissue."""
    contrasts: tuple[str, ...] = ()
    """The contrasts that are named, of a mask, too."""
    space: str = ""
    """The modality to whose image this one was registered: `FLAIR_to_T1`."""
    plane: str = ""
    """The plane that is named: ax, sag or cor."""
    extras: int = 0
    """How many words there are of sequence, plane, step and copy: the image of fewest is the plain one."""
    automatic: bool = False
    """Whether a program made it, not a person."""
    run: int = 0
    """The run of a BIDS name, 0 where it says none, -1 where a later one replaced it."""
    weak: bool = False
    """Whether an agent alone says the contrast (`P1_POST`): it counts beside other contrasts of that head."""
    doubt: Doubt = ""
    """What the first word that has a role may be instead; `literal` is then the other reading."""


def read_words(stem: str, *, literal: bool = False) -> Reading:
    """What the name of a file says, without its suffix.

    `literal` leaves to the head what may be a visit or the patient: T2 in `P1_T2_FLAIR`, pre in `pre_T1`, 7 in `7_T1`.
    """
    stem = _ARCHIVE.sub("", stem)
    words = _cut(_GE_WITHOUT.sub("pre", stem))
    words, after, space = _at_link(words)
    if len(words) > 2 and _TIME.fullmatch(words[-2].text) and _number(words[-1]):  # dcm2niix: of which series
        words = words[:-1]
    visit = ""
    found = trailing_visit([word.text for word in words])
    agent = [] if literal or not found else _agent_instead(words[-found:], words[:-found])
    if agent:
        words = [*words[:-found], *agent]
        found = trailing_visit([word.text for word in agent[1:]])
    if found and not all(word.pieces for word in words[len(words) - found :]):  # "post_3D" is no visit
        left = words[: len(words) - found]
        if left and (left[-1].pieces or _number(left[-1])) and any(w.has("contrast", "mask", "sequence") for w in left):
            visit = "_".join(word.text for word in words[len(left) :])
            words = left
    tail, doubt = _tail(words, literal)
    said = _meaning([*tail, *after])
    if said is None:
        return Reading()
    start = tail[0].start if tail else 0
    before = [word for word in words if word.start < start]
    if len(before) > 1 and before[0].has("contrast") and not any(re.search(r"\d", word.text) for word in before[1:]):
        return Reading()  # "t2_xyz_flair" is of no patient called t2_xyz
    moved = int(bool(space or after))
    return replace(
        said,
        head=stem[:start].rstrip("-_. ([+,"),
        visit=visit,
        space=space,
        extras=said.extras + moved,
        doubt=doubt or ("agent" if agent else ""),
    )


def _agent_instead(visit: Sequence[Word], before: Sequence[Word]) -> list[Word]:
    """The words of a visit with `post` or `pre` read as of an agent, where a T1 is before them; else none.

    They may be with a number or a date: T1_post_1, T1_post1, T1_post_20200101.
    """
    named = _AGENT_OR_VISIT.fullmatch(visit[0].text.lower())
    said = _meaning(_tail(before, literal=False)[0])
    if named is None or any(re.search("[a-z]", word.text.lower()) for word in visit[1:]):
        return []
    if said is None or said.meaning != "t1n" or said.weak:
        return []
    agent, dated = visit[0]._replace(pieces=_pieces(named[1])), trailing_visit([word.text for word in visit[1:]])
    others = visit[1 : len(visit) - dated]
    return [agent, *visit[1:]] if all(_number(word) for word in others) else []


def spelt(text: str) -> str:
    """The modality or `LABEL` that a text spells and nothing more, else '': 'T1 Gd' is t1c."""
    words = _cut(text)
    if not words or not all(word.has("contrast", "agent", "mask", "tissue", "origin") for word in words):
        return OTHER
    reading = read_words(text)
    return OTHER if reading.head or reading.weak or reading.space else reading.meaning


def possible_contrasts(name: str) -> frozenset[str]:
    """The modalities that an image may be whose name `read` does not know; all where the name says nothing.

    None where it says something else: a mask, a map, a diffusion image, an angiogram. A T1 may be enhanced, unless a
    word says that it is a copy of another one, or was acquired without contrast agent.
    """
    said = _said(name)
    if said & {"none", "mask"}:
        return frozenset()
    found = said & {"t2w", "t2f", "pdw"}
    if {"t2w", "t2f"} <= said and "t1" not in said:  # T2_FLAIR
        found.remove("t2w")
    if "t1" in said:
        found |= {"t1c"} if "with" in said else {"t1n"} if said & {"without", "copy"} else {"t1n", "t1c"}
        found |= {"t1n"} if {"with", "without"} <= said else set()
    found = found or ({"t1c"} if "with" in said else {"t1n"} if "without" in said else set())
    return frozenset(found or CONTRASTS)


def says_no_label(name: str) -> bool:
    """Whether the name of a file says that it is neither a contrast nor of a lesion: DWI, perf, brain, prob."""
    return "none" in _said(name)


def _said(name: str) -> set[str]:
    return {hint for word in re.split(r"[^\w*+]+|_", name.lower()) if word for hint in _hints(word)}


def agent_of_word(word: str) -> bool | None:
    """Whether a word such as `postgad`, `T1Gd` or `pre` says that an agent was given; None where it does not."""
    said = _hints(word.lower()) & {"with", "without"}
    return None if len(said) != 1 else said == {"with"}


def _hints(word: str) -> set[str]:
    roles = {role for piece in _pieces(word) for role in piece.roles}
    found = {hint for role in roles for hint in _HINTS_BY_ROLE.get(role, ())}
    kinds = {kind for kind, _ in roles}
    if kinds & {"step", "raw", "registered"} or ("tissue" in kinds and word in ("brain", "skull", "head")):
        found.add("copy")
    elif kinds & {"tissue", "other", "space"}:
        found.add("none")
    elif "mask" in kinds:
        found.add("mask")
    return found | {hint for hint, words in _HINTS_OF.items() if words.fullmatch(word)}


def describes(name: str) -> bool:
    """Whether a folder is named after what its files are: by steps of processing and spaces alone (`Raw_Data`), or, at
    the end of a name without a number, by a kind of mask (`images_segm`).
    """
    words = _cut(name)
    if words and words[-1].text.lower() in _KINDS and not re.search(r"\d", name):
        return True
    return any(word.has("step", "space", "registered") for word in words) and all(word.pieces for word in words)


def says_form(text: str) -> bool:
    """Whether a text says in which form an image is and nothing else: brain1, hdbet2, iso1mm, MNI152NLin2009."""
    words = [word.text.lower() for word in _cut(text)]
    known = [word for word in words if not re.fullmatch(r"\d{1,5}", word)]
    return bool(known) and all(_TEMPLATE.fullmatch(word) or _is_form(word) for word in known)


def _is_form(word: str) -> bool:
    roles = {role for piece in _whole(word) for role, _ in piece.roles}
    return bool(roles) and roles <= {*_FORM_ROLES, "copy", "link"} and not (word in _ONLY_AFTER and len(word) < 3)


def _whole(word: str) -> tuple[Piece, ...]:
    """The pieces of a word, whatever they say together."""
    return (Piece(word, tuple(_ROLES[word])),) if word in _ROLES else _glued(word)


_PLAIN = re.compile(
    r"imgs?|images?|scans?|data|datasets?|sets?|cohorts?|volumes?|vols?|imaging|sites?|cent(er|re)s?|hospitals?|"
    r"clinics?|groups?|batch|mri?|niis?|niftis?"
)
"""Words of a folder of images that say neither whose they are nor in which form."""
_BEFORE_OR_AFTER = re.compile(r"(?<![a-z])(?:pre|post)(?![a-z])", re.I)


def are_copies(one: str, other: str) -> bool:
    """Whether folders beside one another, by their names, hold one cohort in several forms: imgs and imgs_smoothed.

    So it is where nothing tells them apart but what their images are, or one name begins with the other: images is no
    form of external, UCL none of UCLA, and pre-chemo none of post-chemo.
    """
    if _BEFORE_OR_AFTER.findall(one) != _BEFORE_OR_AFTER.findall(other):
        return False
    (first, shorter), (second, _) = sorted(
        ((_core(name), name) for name in (one, other)), key=lambda pair: len(pair[0])
    )
    low, high = sorted((one.lower(), other.lower()), key=len)
    begins = high.startswith(low) and high[len(low) :][:1] in ("", *SEPARATORS)
    plain = all(_PLAIN.fullmatch(word.text.lower()) for word in _cut(shorter))
    if first == second[: len(first)] and (first or not second or begins or not plain):
        return True
    short, long = sorted(("".join(first), "".join(second)), key=len)
    return len(short) > 2 and long.startswith(short) and says_form(long[len(short) :])


def differ_in_form(one: str, other: str) -> bool:
    """Whether names of folders differ in nothing but the form of their images, and no number."""
    return _core(one) == _core(other) and re.findall(r"\d+", one) == re.findall(r"\d+", other)


@lru_cache(maxsize=10_000)
def _core(name: str) -> tuple[str, ...]:
    """The words of a folder's name that say neither what images in it are nor that they are images."""
    words = _cut(name)
    agent = any(word.has("agent") for word in words)
    found = []
    for word in words:
        text = word.text.lower()
        short = len(text) < 2 or text.isdigit() or (text in _ONLY_AFTER and len(text) < 3)
        roles = {role for piece in _whole(text) for role, _ in piece.roles} - {"link", "copy", "mask"}
        said = roles - (set() if agent else {"denial", "filler"})
        if short or not (said or text in _KINDS or _FORM.fullmatch(text) or _TEMPLATE.fullmatch(text)):
            found.append(text)
    return tuple(found)


def holds_labels(name: str) -> bool:
    """Whether a folder is named after segmentations of lesions and nothing else: labels, labelsTr, Tumor-Masks."""
    words = _cut(re.sub(r"(?i)^labels(tr|ts)$", "labels", name))
    known = all(word.has("mask", "origin", "noise") and not word.has("tissue") for word in words)
    return known and any(word.has("mask") for word in words)


def holds_kind_of_labels(name: str) -> bool:
    """Whether a folder's name ends with a word for masks themselves, not for what they are of, as lesions does."""
    words = _cut(name)
    return bool(words) and words[-1].text.lower() in {*_KINDS, "label", "labelstr", "labelsts", "msk"}


def holds_masks(name: str) -> bool:
    """Whether a folder is named after masks, which may be of the brain, too."""
    return any(word.text.lower() in ("mask", "masks", "msk") for word in _cut(name))


def is_raw(name: str) -> bool:
    """Whether a folder is named after images as the scanner made them."""
    return any(word.has("raw") for word in _cut(name))


def _cut(stem: str) -> list[Word]:
    return [Word(found[0], found.start(), _pieces(found[0].lower())) for found in _WORD.finditer(stem)]


@lru_cache(maxsize=10_000)
def _pieces(word: str) -> tuple[Piece, ...]:
    """The pieces of a word in lower case; none where it has no role."""
    if word in _ROLES:
        return (Piece(word, tuple(_ROLES[word])),)
    found = _glued(word)
    if found and found[-1].text == "2":
        return ()
    contrasts = [piece.value("contrast") for piece in found if piece.value("contrast")]
    linked = any(piece.text == "2" for piece in found)
    if len(contrasts) > 1 and not linked and not (len(contrasts) == 2 and contrasts[1] == "flair"):
        return ()
    return found if contrasts or any(piece.value("mask") is not None for piece in found) else ()


def _glued(word: str) -> tuple[Piece, ...]:
    if not word:
        return ()
    if word.startswith("r") and (moved := _pieces(word[1:])) and moved[0].value("contrast"):
        return (Piece("r", (("registered", ""),)), *moved)
    for end in range(len(word), 1 if word[0] != "2" else 0, -1):
        text, rest = word[:end], word[end:]
        if text not in _ROLES or text in _NEVER_GLUED:
            continue
        piece = Piece(text, tuple(_ROLES[text]))
        if not rest:
            return (piece,)
        if re.fullmatch(r"\d{1,2}", rest) and text[-1].isalpha():
            return (piece, Piece(rest, (("copy", ""),)))
        if following := _glued(rest):
            return (piece, *following)
    return ()


def _number(word: Word) -> bool:
    return re.fullmatch(r"\d{1,5}|run\d*|rep\d*", word.text.lower()) is not None


def _implied(word: Word) -> bool:
    """Whether its sequence says a T1: MPRAGE."""
    return any(piece.value("sequence") == "t1" for piece in word.pieces)


def _at_link(words: list[Word]) -> tuple[list[Word], list[Word], str]:
    """The words before `to` in `FLAIR_to_T1`, those after, and the latter's modality; else all of them."""
    for at, word in enumerate(words):
        if len(word.pieces) > 2 and any(piece.text == "2" for piece in word.pieces):  # FLAIR2T1
            cut = next(n for n, piece in enumerate(word.pieces) if piece.text == "2")
            target = Word(word.text, word.start, word.pieces[cut + 1 :])
            return [*words[:at], word._replace(pieces=word.pieces[:cut])], _steps(words[at + 1 :]), _target([target])
        before, after = words[:at], words[at + 1 :]
        linking = word.has("link") or (word.has("registered") and not word.has("contrast"))
        if not linking or not before or not after or not all(w.pieces or _number(w) for w in after):
            continue
        if not any(w.has("contrast", "space") for w in after[:2]):
            continue
        visit = trailing_visit([w.text for w in before])
        tail, _ = _tail(before[: len(before) - visit], literal=False)
        if any(w.has("contrast", "mask") for w in tail):
            return before, [word, *_steps(after)], _target(after)
    return words, [], ""


def _steps(words: Sequence[Word]) -> list[Word]:
    """What the words after a link say of the image, not of the space."""
    return [word for word in words if not word.has("contrast", "agent", "space")]


def _target(words: Sequence[Word]) -> str:
    said = _meaning([word for word in words if word.has("contrast", "agent")])
    return said.meaning if said else ""


def _tail(words: Sequence[Word], literal: bool) -> tuple[list[Word], Doubt]:
    """The last words, as far as all have a role and belong to one contrast; and what the first may be instead."""
    start, contrast = len(words), ""
    doubt: Doubt = ""
    for at in range(len(words) - 1, -1, -1):
        word = words[at]
        named = [value for piece in word.pieces if (value := piece.value("contrast"))]
        if named and contrast:
            admitted, first = contrast == "flair" and named[-1] in ("t1", "t2"), _visit_instead(word)
        elif named:
            admitted, first = True, ""
        elif re.fullmatch(r"p\d", word.text.lower()) and not any(w.has("contrast") or _implied(w) for w in words[:at]):
            break  # P2_seg is of P2
        else:
            admitted, first = _admits(word, words[at + 1 :], contrast, first=at == 0)
        if not admitted or (literal and first):
            break
        if named:
            contrast = "t2f" if contrast or len(named) > 1 else named[0]
            contrast = {"with": "t1c", "without": "t1n"}.get(_glued_agent(word), "t1") if named[0] == "t1" else contrast
        start, doubt = at, first or doubt
    return list(words[start:]), doubt


def _glued_agent(word: Word) -> str:
    """What the agent in a word that names a contrast says: "with" of T1ce, "without" of T1pre, or ""."""
    named = any(piece.value("contrast") for piece in word.pieces)
    return next((said for piece in word.pieces if named and (said := piece.value("agent"))), "")


def _visit_instead(word: Word) -> Doubt:
    return "visit" if word.text.lower() in ("t1", "t2") else ""


def _admits(word: Word, said: Sequence[Word], contrast: str, *, first: bool) -> tuple[bool, Doubt]:
    """Whether a word that names no contrast has a role before those of `said`, and what it may be instead."""
    if (_number(word) and not word.pieces) or word.text == "2":
        if not any(other.has("contrast", "mask", "agent") or _implied(other) for other in said):
            return True, ""
        return first and not any(other.has("mask") for other in said), "number"
    if not word.pieces or not contrast:
        return bool(word.pieces), ""
    if word.has("denial") and said[0].has("agent"):  # non_contrast_T1; Sin_Gd_T1 is of Sin, if there is a Sin_T2
        return True, "agent"
    after_only = word.text.lower() in _ONLY_AFTER or word.has("link", "space")
    if word.has("agent") and not after_only:
        visit_word = word.text.lower() in ("pre", "post")
        may_be_agent = contrast == "t1" or (contrast == "t1c" and word.text.lower() == "post")  # pre_T1ce is of a visit
        return may_be_agent or not visit_word, "agent" if visit_word else ""
    return not after_only and (first or not word.has("noise", "other")), ""


def _meaning(words: Sequence[Word]) -> Reading | None:
    """What these words say together; None where they say nothing that is known."""
    pieces = [piece for word in words for piece in word.pieces]
    contrasts = [value for piece in pieces if (value := piece.value("contrast"))]
    agents = {value for piece in pieces if (value := piece.value("agent"))}
    roles = {role for piece in pieces for role, _ in piece.roles}
    if any(piece.text == "km" for piece in pieces) and not roles & {"sequence", "plane", "denial", "filler"}:
        return None  # in a scanner's protocol it is German for an agent, alone it may be somebody's initials
    agents = {said for word in words if (said := _glued_agent(word))} or agents
    if "denial" in roles and agents:
        agents = {"without"}
    mask = any(piece.value("mask") is not None or piece.text == "brainmask" for piece in pieces)
    implied = any(piece.value("sequence") == "t1" for piece in pieces)
    if not (contrasts or agents or mask or implied):
        return None
    if mask:
        lesion = any(piece.text.startswith(("lesion", "tumo")) for piece in pieces)
        stripping = any(piece.text in _STRIPPING for piece in pieces) and all(
            piece.text in ("mask", "masks", "msk") for piece in pieces if piece.value("mask") is not None
        )
        tissue = (stripping or any(piece.value("tissue") is not None for piece in pieces)) and not lesion
        meaning = OTHER if tissue else LABEL
    else:
        meaning = _modality(contrasts, agents)
        if roles & {"other", "origin"}:
            meaning = OTHER
    counted = ("sequence", "plane", "step", "registered", "copy", "tissue", "denial")
    extras = [piece for piece in pieces if any(role in counted for role, _ in piece.roles)]
    return Reading(
        meaning=meaning,
        mask=mask,
        contrasts=tuple(contrasts),
        plane=next((value for piece in pieces if (value := piece.value("plane"))), ""),
        extras=len(extras) + sum(_number(word) for word in words) + (contrasts == ["t1", "flair"]),
        automatic=any(piece.value("origin") == "auto" for piece in pieces),
        weak=not contrasts and not mask and not implied,
    )


def _modality(contrasts: Sequence[str], agents: set[str]) -> str:
    """Contrast and agent in one; an enhanced image other than T1 has no name here."""
    base = contrasts[0] if contrasts else "t1"
    if base == "t2" and contrasts[-1] == "flair":
        base = "flair"
    enhanced = agents == {"with"}
    if base in ("t1", "t1n"):
        return "t1c" if enhanced else "t1n"
    if base == "t1c":
        return "t1c"
    return OTHER if enhanced else {"t2": "t2w", "flair": "t2f", "t2f": "t2f", "pd": "pdw"}[base]
