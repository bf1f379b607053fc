"""What words say of a contrast agent, as scanners' operators and archives write them in many languages."""

import pytest

from crossmr.data.contrast_agent import is_placeholder, is_unclear, names_agent, said_of_agent, says_agent
from crossmr.dicom.contrast import Acquisition, recognise_contrast


def acquisition(description="", agent=None) -> Acquisition:
    """A T1 by its times."""
    return Acquisition(frozenset({"SE"}), tr_ms=500, te_ms=12, agent=agent, description=description)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *(("", None), (" ", None), ("Gadavist", True), ("7.5ml Dotarem", True), ("NO", False), ("none", False)),
        *(("No contrast", False), ("without", False), ("N/A", False), ("Magnevist", True)),
        *(("NON CONTRAST", False), ("None given", False), ("Not given", False), ("N", False), ("n.a.", False)),
        *(("-", False), ("Nein", False), ("0 ml", False), ("Nonionic agent", True), ("10 ml", True)),
    ],
)
def test_agent(text, named):
    assert names_agent(text) is named


SAID = {  # what scanners' operators write: with an agent, without
    "English": (
        "T1 POST|AX T1 WITH CONTRAST|T1 C+|T1 (C+)|T1 WITHOUT FS POST GD|T1 ENHANCED|T1 after Gadovist|AX T1 3D POST|"
        "SAG T1 3D POST FS|COR 2D POST T1|T1 FSE SS GD|T1 SS POST|T1 SS+C|T1 GD free breathing|T1 POST CRANIAL|"
        "T1 POST COIL 32",
        "T1 C-|T1 (C-)|T1 WITHOUT IV CONTRAST|T1 PRECONTRAST|T1 GD(-)|T1 before injection|T1 UNENHANCED|"
        "AX T1 W/OUT CONTRAST|T1 wout gad|T1 minus contrast|T1 prior to contrast|T1 b4 gad|T1 GAD NO|T1 gad free|"
        "T1 nogad|T1 non-enhanced|T1 NON CON|T1 NON CON FS",
    ),
    "German": (
        "T1 nach KM|t1_mit_KM|T1 tra KM|T1 tra nach i.v. KM|t1_tse_tra_i.v.KM|T1 Kontrastmittel|T1 ohne FS mit KM",
        "T1 ohne KM|T1 nativ|T1_vor_KM|T1 o.KM|T1 o. KM|T1 v. KM",
    ),
    "French": (
        "T1 après injection|T1 AVEC GADO|T1 injecté|T1 GADO|T1 post-gado",
        "T1 sans injection de gado|T1 avant gado|T1 sans|T1 ss inj|T1 s/ inj|T1 SS GADO|T1 SS GD|T1 S GADO",
    ),
    "Spanish": (
        "T1 AX CON CONTRASTE|T1 C/C|T1 con gadolinio|T1 CIV|T1 C/CONTRASTE",
        "T1 AX SIN CONTRASTE|T1 S/C|T1 sin civ|T1 SIMPLE|T1 s/ contraste|T1 S/ GD",
    ),
    "Portuguese": (
        "T1 COM CONTRASTE|T1 PÓS|T1 pós-contraste|T1 após gadolínio",
        "T1 SEM CONTRASTE|T1 antes do contraste|T1 SEM",
    ),
    "Italian": (
        "T1 con mdc|T1 dopo mdc|T1 con mezzo di contrasto|T1 MDC|T1 con m.d.c.|T1 M D C|T1 c.e.|T1 C E|T1_c.e.",
        "T1 senza mdc|T1 s. mdc|T1 senza m.d.c.|T1 s/m.d.c.|T1 senza mezzo di contrasto|T1 basale",
    ),
    "Dutch": ("T1 met contrast|T1 na contrast|T1 na gado", "T1 zonder contrast|T1 voor contrast|T1 blanco"),
    "Polish": (
        "T1 z kontrastem|T1 po kontraście|T1 po podaniu środka kontrastowego",
        "T1 bez kontrastu|T1 przed kontrastem|T1 bez środka kontrastowego",
    ),
    "Czech": ("T1 s kontrastem|T1 po KL|T1 postkontrastně", "T1 bez KL|T1 nativně|T1 před kontrastem"),
    "Nordic": (
        "T1 med kontrast|T1 efter kontrast|T1 etter kontrast|T1 tehosteen jälkeen",
        "T1 utan kontrast|T1 uden kontrast|T1 uten kontrast|T1 u. kontrast|T1 före kontrast|T1 før kontrast|"
        "T1 ilman tehostetta",
    ),
    "Russian": (
        "T1 с контрастом|Т1 после контраста|T1 с КУ|T1 контрастное усиление",
        "T1 без контраста|T1 до КУ|Т1 нативная|T1 без КУ",
    ),
    "Turkish": (
        "T1 kontrastlı|T1 KONTRAST SONRASI|T1 IVKM",
        "T1 kontrastsız|T1 KONTRASTSIZ|T1 kontrast öncesi|T1 IVKM'siz",
    ),
    "Chinese": ("T1增强|T1 增强后|T1+C|T1 強化 造影|T1注药后", "T1平扫|T1 增强前|T1未增强|T1 平掃"),
    "Japanese": (
        "T1 造影|T1造影後|T1WI 造影|T1 ガドリニウム|T1 Gd(+)",
        "T1 造影前|T1非造影|T1 単純|T1 造影なし|T1 Gd(-)",
    ),
}


@pytest.mark.parametrize("language", SAID)
def test_an_agent_by_the_description_in_many_languages(language):
    given, denied = SAID[language]
    for texts, wanted, modality in ((given, True, "t1c"), (denied, False, "t1n")):
        for text in texts.split("|"):
            assert says_agent(text) is wanted, text
            assert recognise_contrast(acquisition(text)).modality == modality, text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "AX T1",
            "T1 SAG+COR",
            "T1 POST OP",
            "T1 ohne FS",
            "T1 sin grasa",
            "T1 C-SPINE",
            "T1 POSTOP",
            "",
            "T1 SE COR",
        ),
        *("AX T1 BASAL GANGLIA", "T1 basal cisterns", "T1 gangli della base", "T1 SAG POS 2", "T1 POS 1"),
        *("T1 MAGNETIZATION TRANSFER CONTRAST", "AX T1 MAGN TRANSFER CONTRAST", "T1 HIGH CONTRAST"),
        *("T1 grey matter contrast", "T1 EDGE ENHANCED", "MPRAGE CONTRAST OPTIMIZED", "T1 ENHANCED RESOLUTION"),
        *("T1 post craniotomy", "T1 post lobectomy", "T1 post implant", "T1 post SRS", "T1 1yr post", "T1 POST GK"),
    ],
)
def test_no_word_of_the_agent(text):
    assert says_agent(text) is None


@pytest.mark.parametrize(
    ("text", "agent", "surely"),
    [
        *((text, True, True) for text in ("T1 GD", "T1 BASAL GD", "T1 WITH CONTRAST", "T1+CONTRAST", "T1 POST")),
        *((text, True, True) for text in ("T1 CON CONTRASTE", "T1 PÓS-CONTRASTE", "T1 CONTRAST ENHANCED")),
        *((text, True, None) for text in ("T1 CONTRAST", "T1 ENHANCED", "T1 PÓS", "AX TRANS CONTRAST", "T1 POS 3 MIN")),
        *((text, False, False) for text in ("T1 nativ", "T1 PRE", "T1 NO CONTRAST", "T1 sin contraste", "T1 C-")),
        *((text, False, None) for text in ("T1 BASAL", "T1 SIMPLE", "T1 plain", "T1 native", "T1 blanco")),
        *((text, None, None) for text in ("SIMPLE Y CONTRASTADO", "T1 SIMPLE Y GD", "T1 nativ + KM", "AX T1")),
    ],
)
def test_words_that_may_mean_something_else_are_not_sure(text, agent, surely):
    said = said_of_agent(text)
    assert said == (agent, surely)
    assert [said.contradicts(tag) for tag in (True, False, None)] == [
        agent is False and surely is None,
        agent is True and surely is None,
        False,
    ]


BOTH = (
    *(
        "BRAIN W/WO CONTRAST",
        "BRAIN W WO",
        "MR BRAIN WITH AND WITHOUT CONTRAST",
        "W/ & W/O IV CONTRAST AGENT",
        "W+WO GAD",
    ),
    *("CEREBRO SIMPLE + CONTRASTE", "BRAIN PLAIN + CONTRAST", "BASALE + MDC", "ENCEFALO BLANCO/CONTRASTE"),
    *("HEAD WITHOUT AND WITH", "BRAIN WWO", "BRAIN PRE/POST", "PRE GD/POST GD", "BRAIN +/- GAD", "C+/-", "W/WO FS"),
    *("before and after Gadovist", "con y sin contraste", "sin y con contraste", "sans et avec injection"),
    *("MRT vor/nach KM", "mit und ohne KM", "z i bez kontrastu", "с и без контраста", "до и после контраста"),
)


@pytest.mark.parametrize("text", BOTH)
def test_with_and_without_leaves_the_agent_to_the_tag(text):
    assert says_agent(text) is None
    for agent, modality in ((True, "t1c"), (False, "t1n"), (None, "t1n")):
        assert recognise_contrast(acquisition(text, agent)).modality == modality


@pytest.mark.parametrize(
    ("text", "given"),
    [("W/WO CONTRAST T1 POST", True), ("AX T1 +C W/WO GAD", True), ("W/WO T1 PRE", False), ("T1 C- W/WO IV", False)],
)
def test_a_series_in_an_examination_with_and_without(text, given):
    assert says_agent(text) is given


@pytest.mark.parametrize("text", ["W/WO", "WITH AND WITHOUT 10 ML GADAVIST"])
def test_a_tag_of_with_and_without_is_unclear(text):
    assert names_agent(text) is None
    assert is_unclear(text)


@pytest.mark.parametrize(
    "text",
    [
        *("REMOVED", "ANONYMIZED", "Anonymous", "XXXX", "xxx", "DEIDENTIFIED", "De-identified", "REDACTED", "DUMMY"),
        *(
            "[Removed by CTP]",
            "***",
            "unknown",
            "HIDDEN",
            "NOT AVAILABLE",
            "not removed",
            "Value deleted",
            "NULL",
            "MASKED",
            "ANON",
            "?",
            "Z9F3K",
        ),
    ],
)
def test_a_placeholder_is_no_agent(text):
    assert not names_agent(text)
    assert recognise_contrast(acquisition(agent=names_agent(text))).modality == "t1n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *(("sin contraste", False), ("ohne", False), ("senza mdc", False), ("без контраста", False), ("なし", False)),
        *(("YOK", False), ("brak", False), ("geen", False), ("无", False), ("ingen", False), ("aucun", False)),
        *(("m.d.c. 10 ml", True), ("m.d.c.", True), ("senza m.d.c.", False)),
        *(("Gadobutrol 7,5 ml", True), ("GD-DTPA", True), ("CLARISCAN", True), ("Con contraste", True), ("YES", True)),
        *(
            ("ガドビスト", True),
            ("钆喷酸葡胺", True),
            ("гадовист", True),
            ("0.1 mmol/kg", True),
            ("IV", True),
            ("15", True),
        ),
    ],
)
def test_agent_in_other_languages(text, named):
    assert names_agent(text) is named


@pytest.mark.parametrize("text", ["AX T1 FAT S GADO", "T1 FAT.S GADO", "T1 F S GADO"])
def test_an_s_of_saturation_denies_no_agent(text):
    assert said_of_agent(text).agent is not False


def test_an_agent_beside_a_word_of_de_identification_is_named():
    assert names_agent("Dotarem hidden") is True
    assert names_agent("Gadovist not available") is True
    assert is_placeholder("HIDDEN")
    assert is_placeholder("not available")
