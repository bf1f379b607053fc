"""Contrasts from acquisition tags, with the values that vendors write."""

import re

import pytest

from crossmr.dicom.contrast import Acquisition, names_agent, recognise_contrast


def acquisition(families="", tr=None, te=None, ti=None, *, variants="", kinds="", **others) -> Acquisition:
    return Acquisition(
        frozenset(families.split()),
        frozenset(variants.split()),
        tr,
        te,
        ti,
        kinds=frozenset(kinds.split(";")),
        **others,
    )


PLAIN = (
    "AX T1 NON CONTRAST",
    "T1 non-contrast",
    "T1_NO_GAD",
    "T1 vor KM",
    "T1 POST OP",
    "T1 SAG+COR",
    "T1 pre contrast",
)
ENHANCED = (
    "T1+GD",
    "AX T1+GAD",
    "MPRAGE+GD",
    "T1+KM",
    "T1CE",
    "T1GD",
    "T1post",
    "T1 POSTCONTRAST",
    "T1 +C",
    "T1C+",
    "t1 gd",
)


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        (acquisition("SE", 500, 12), "t1n"),
        (acquisition("SE", 600, 9, agent=True), "t1c"),
        (acquisition("SE", 600, 9, agent=False), "t1n"),
        (acquisition("GR IR", 2300, 2.98, 900, variants="SK SP MP"), "t1n"),  # MPRAGE
        (acquisition("GR", 8.2, 3.2, 450, variants="SS SP SK"), "t1n"),  # BRAVO, FSPGR
        (acquisition("GR", 8.1, 3.7, variants="MP", agent=True), "t1c"),  # 3D TFE
        (acquisition("SE IR", 2000, 20, 800), "t1n"),  # T1-FLAIR
        (acquisition("SE", 700, 15), "t1n"),  # SPACE, CUBE
        (acquisition("SE", 5000, 100), "t2w"),
        (acquisition("SE", 3200, 408), "t2w"),  # 3D SPACE
        (acquisition("SE IR", 9000, 120, 2500), "t2f"),
        (acquisition("IR", 4800, 340, 1650), "t2f"),  # 3D VISTA
        (acquisition("SE", 9000, 120, 2500), "t2f"),  # TI without IR
        (acquisition("SE", 3000, 15), "pdw"),
        (acquisition("SE", 600, None, acquired="FLUID_ATTENUATED"), "t2f"),
        (acquisition(acquired="T1", agent=True), "t1c"),
        (acquisition("SE", 500, 12, description="Ax T2 FLAIR"), "t1n"),  # tags before words
        (acquisition("SE", 500, 12, description="AX T1 POST GD"), "t1c"),
        (acquisition("SE", 500, 12, agent=True, description="AX T1 pre"), "t1n"),  # named for the whole examination
        (acquisition(description="t1_mprage_sag_p2_iso"), "t1n"),
        (acquisition(description="AX T1 +C"), "t1c"),
        (acquisition(description="t2_tirm_tra_dark-fluid"), "t2f"),
        (acquisition(description="sT2W_TSE"), "t2w"),
        (acquisition(description="t1_se_tra_KM"), "t1c"),
        (acquisition(description="T1 w/o contrast"), "t1n"),
        (acquisition("SE", 3000, 15, 0), "pdw"),  # TI 0: nothing was inverted
        *((acquisition("SE", 500, 12, description=text), "t1n") for text in PLAIN),
        *((acquisition("SE", 500, 12, description=text), "t1c") for text in ENHANCED),
    ],
)
def test_ours(given, modality):
    assert recognise_contrast(given).modality == modality


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (acquisition("SE", 500, 12, kinds="ORIGINAL;PRIMARY;LOCALIZER"), "localiser"),
        (acquisition("SE", 500, 12, kinds="DERIVED;SECONDARY;SUB"), "subtraction"),
        (acquisition("GR", 30, 5, kinds="DERIVED;SECONDARY;MIP"), "projection"),
        (acquisition("GR", 500, 4, kinds="ORIGINAL;PRIMARY;P"), "phase"),
        (acquisition("EP", 5000, 90), "echo-planar"),
        (acquisition("SE", 5000, 90, diffusion=True), "diffusion"),
        (acquisition("GR", 25, 5, angiography=True), "angiogram"),
        (acquisition("GR", 28, 20, variants="SP"), "T2\\*"),
        (acquisition("GR", 5, 2.2, variants="SS SK"), "steady state"),
        (acquisition("SE IR", 4000, 50, 150), "short inversion"),
        (acquisition(description="3-plane loc"), "description"),
        *(
            (acquisition("GR", 3.15, 1.37, description=text), "description")
            for text in ("AAHScout", "AAHScout_32ch", "CoilSurvey", "SmartSurvey", "SENSE_Ref", "B1map")
        ),
        (acquisition(description="ep2d_diff_trace"), "description"),
        (acquisition(description="AX T2*"), "description"),
        (acquisition("SE", 1500, 50), "neither"),
        (acquisition(), "neither"),
        (acquisition(description="T1 and T2"), "neither"),
    ],
)
def test_none_of_ours(given, why):
    verdict = recognise_contrast(given)
    assert verdict.modality is None
    assert re.search(why, verdict.why)


def test_the_reason_repeats_no_words_of_the_description():
    for given in (acquisition(description="Doe T1 +C"), acquisition("SE", 500, 12, description="Doe"), acquisition()):
        assert "Doe" not in recognise_contrast(given).why


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
