"""Contrasts from acquisition tags, with the values that vendors write."""

import re
from dataclasses import replace

import pytest

from crossmr.dicom.contrast import (
    Acquisition,
    covers,
    names,
    recognise_contrast,
    resolve_agents,
)


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
    "AX T1 POST FOSSA",
    "SAG T1 POST SURGERY",
    "T1 POST RT",
    "T1 POST TREATMENT",
    "T1 POST ICTAL",
    "T1 apres chirurgie",
    "T1 dopo intervento",
    "T1 INJURY PROTOCOL",
    "AX T1 PRE OPTIC NERVES",
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
    "T1 VIBE POST OP +GD",
    "T1 PRE OP GAD",
    "T1 POST RT POST GD",
    "AX T1 POST RADIAL VIBE FS",
    "POST RT PLANNING T1",
    "T1 POST SURGICAL NAV",
    "T1 POST PROCESSED",
    "T1 apres injection",
    "AX T1 +GD LARGE FIELD",
)

HARMLESS = ("AX T2 FSE FLOW COMP", "T2 AX PHASE RL", "t2_tse_cor_EPI", "T2W_TSE_DRIVE", "T2 pre-op")
"""Of which a part would say something else."""


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
        *((acquisition("SE", 4500, 100, description=text), "t2w") for text in HARMLESS),
        (acquisition("SE IR", 9000, 110, 2500, description="FLAIR EPI"), "t2f"),
        (acquisition("RM", 800, 20, description="AX T1"), "t1n"),
        (acquisition("RM", 1400, 90, description="SSFSE T2"), "t2w"),
        (acquisition("SE IR", 9000, 110, 2500, description="sub-01_FLAIR"), "t2f"),
        (acquisition("SE", 500, 12, description="T1 SE GADC"), "t1c"),
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
        (acquisition("RM", 800, 20, description="AX T2"), "called T2"),
        (acquisition("RM", 800, 20, description="AX T2 GRE"), "susceptibility"),
        (acquisition("SE", 4500, 90, description="sDWI"), "diffusion"),
        (acquisition("SE", 4500, 90, description="T2 EPI"), "diffusion"),
        (acquisition("SE", 4500, 90, description="T2 DRIVE"), "steady state"),
        (acquisition("SE", 4500, 90, description="gre_field_mapping"), "field map"),
        (acquisition("GR", 488, 4.92, description="gre_field"), "field map"),
        (acquisition("SE IR", 9000, 110, 2500, description="3D Double Inversion Recovery"), "double inversion"),
        (acquisition("SE IR", 9000, 110, 2500, description="FLAIR SUBTRACTION"), "subtraction"),
        (acquisition("SE IR", 9000, 110, 2500, description="FLAIR MIP"), "projection"),
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


MP = "SK SP MP"


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        (acquisition("SE IR", 9000, 120, description="AX FLAIR"), "t2f"),  # the inversion time is missing
        (acquisition("SE IR", 9000, 120), "t2f"),
        (acquisition("SE", 9000, 120, description="t2_tirm_dark-fluid"), "t2f"),
        (acquisition("SE", 9000, 120, description="AX T2"), "t2w"),
        (acquisition("SE IR", 9000, 120, description="AX T2"), None),
        (acquisition("SE IR", 2200, 20, description="AX T1 FLAIR"), "t1n"),
        (acquisition(description="T1_FLAIR"), "t1n"),
        (acquisition("SE IR", 4000, 50), None),  # STIR, it may be
        (acquisition("GR IR", 5000, 2.98, 700, variants=MP, kinds="UNI"), "t1n"),
        (acquisition("GR IR", 5000, 2.98, 700, variants=MP, description="mp2rage_UNI_Images"), "t1n"),
        (acquisition("GR IR", 5000, 2.98, 700, variants=MP, description="mp2rage_UNI-DEN"), "t1n"),
        (acquisition("GR", 7, 3, kinds="DERIVED;DIXON;WATER"), "t1n"),
        (acquisition("GR", 7, 3, kinds="DERIVED;DIXON;IN_PHASE"), "t1n"),
        (acquisition("GR", 7, 3, description="t1_vibe_dixon_tra_W"), "t1n"),
        (acquisition("GR", 7, 3, description="WATER: AX LAVA FLEX"), "t1n"),
        (acquisition("GR", 7, 3, description="T1 VIBE DIXON IN PHASE"), "t1n"),
        (acquisition("GR", 7, 3, description="t1_vibe_fat sat"), "t1n"),
        (acquisition("GR", 24, 5, description="3D SPGR T1"), "t1n"),
        (acquisition("GR", 200, 4.5), "t1n"),  # in two dimensions
        (acquisition("GR", 2500, 3.3, 1100, variants=MP, echoes=4), "t1n"),  # several echoes of an MPRAGE
        (acquisition("SE", 500, 12, agent=False, description="AX T1 GD"), "t1c"),  # the console's NONE
    ],
)
def test_tags_and_description_are_weighed(given, modality):
    assert recognise_contrast(given).modality == modality


GRE_T1 = ("GR", 22, 3.6)
ANGIOGRAMS = ("TWIST", "TRICKS", "CE-MRA", "VENOGRAM", "pc_3d", "PCMRA")
FLOW = ("PCA", "VELOCITY", "M_PCA", "ANGIO", "PHASE CONTRAST M")
OTHER_DIXON = ("FAT", "OPP_PHASE", "F", "OP", "OUT_PHASE")
CALLED_OTHER_DIXON = (
    *("t1_vibe_dixon_tra_F", "t1_vibe_dixon_opp", "FAT: AX LAVA FLEX", "OutPhase: LAVA", "mDIXON out"),
    "T1 opposed phase",
)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        *((acquisition(*GRE_T1, description=t), "angiogram") for t in ("WILLIS 3D", "3D TOF", "TOF3D_slab", "", "MRV")),
        *((acquisition("GR", 5, 2, description=t), "angiogram") for t in ANGIOGRAMS),
        *((acquisition("GR", 20, 5, kinds=k), "flow|phase|angiogram") for k in FLOW),
        (acquisition("GR", 60, 6, description="4D Flow"), "flow"),
        (acquisition("GR", 5, 2, times=20), "several times"),
        (acquisition("GR", 5, 2, description="T1 dynamic"), "several times"),
        (acquisition("GR", 45, 5, echoes=5), "gradient echoes"),
        (acquisition("GR", 700, 4, echoes=3), "gradient echoes"),
        *((acquisition("GR", 7, 3, kinds=f"DERIVED;DIXON;{k}"), "Dixon") for k in OTHER_DIXON),
        *((acquisition("GR", 7, 3, description=t), "Dixon") for t in CALLED_OTHER_DIXON),
        *((acquisition("GR", 7, 3, description=t), "MP2RAGE") for t in ("mp2rage_INV1", "inv-2", "MP2RAGE_INV1_ND")),
        (acquisition("GR IR", 5000, 2.98, 2500, variants=MP), "MP2RAGE"),
        (acquisition("GR IR", 5000, 2.98, 700, variants=MP), "MP2RAGE"),
        (acquisition("GR", 7, 3, description="t1_mp2rage_T1_Images"), "map"),
        (acquisition("GR IR", 3000, 4.4, 409, variants=MP), "white matter nulled"),
        (acquisition("GR", 7, 3, 450, description="FGATIR"), "white matter nulled"),
    ],
)
def test_what_has_the_times_of_a_t1_and_is_none(given, why):
    verdict = recognise_contrast(given)
    assert verdict.modality is None
    assert re.search(why, verdict.why)


MPRAGE = (("GR IR", 2300, 2.98, 900), {"variants": MP})


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        (acquisition("SE", 500, 12, agent=True, description="AX T1 POST PERF"), "t1c"),
        (acquisition("SE", 500, 12, description="AX T1 POST DSC"), "t1c"),
        (acquisition("SE", 500, 12, agent=True, description="T1 arteritis"), "t1c"),
        (acquisition("SE", 500, 12, agent=True, description="T1 VENOUS SINUS"), "t1c"),
        (acquisition("SE", 500, 12, description="T1 after SWI"), "t1n"),
        (acquisition(*MPRAGE[0], **MPRAGE[1], description="t1_mprage_sag_EPI"), "t1n"),
        (acquisition(*MPRAGE[0], **MPRAGE[1], description="T1 MPRAGE SUB MM"), "t1n"),
        (acquisition("SE", 4500, 95, description="AX T2 FSE ASSET"), "t2w"),
        (acquisition("GR", 7, 3, description="t1_starvibe_tra"), "t1n"),
        (acquisition("GR", 7, 3, description="T1 GRADIENT ECHO"), "t1n"),
        (acquisition("SE IR", 9000, 110, 2500, description="sub-01 FLAIR perf"), "t2f"),
        (acquisition(description="T2 BRAIN AND NECK"), "t2w"),
        (acquisition(*MPRAGE[0], **MPRAGE[1], description="SAG 3D T1 NEUROQUANT"), "t1n"),
        (acquisition("SE IR", 9000, 110, 2500, description="SAG FLAIR LESIONQUANT"), "t2f"),
        (acquisition(*MPRAGE[0], **MPRAGE[1], description="T1 3D for segmentation"), "t1n"),
        (acquisition("SE", 4500, 95, description="tra HASTE VP-Shunt"), "t2w"),
        (acquisition("SE", 4500, 95, kinds="DERIVED;SECONDARY;MPR", description="T2 shunt VP"), "t2w"),
        (acquisition("SE IR", 9000, 110, 2500, description="TIRM DARK FLUID V.P. shunt"), "t2f"),
        (acquisition(description="SAG T1 VP SHUNT"), "t1n"),
        *(
            (acquisition("SE", 500, 12, kinds="ORIGINAL;PRIMARY", description=text), "t1n")
            for text in ("BRAIN MAP T1", "STEALTH MAP T1", "AX T1 TTP", "T1 VE", "T1 SUB 1MM", "T1 0.9 sub 0.9 mm")
        ),
        (acquisition(description="T2 tra 30 Grad"), "t2w"),
        (acquisition(description="Axial FLAIR MPR"), "t2f"),
    ],
)
def test_a_word_alone_excludes_no_series_whose_tags_deny_it(given, modality):
    assert recognise_contrast(given).modality == modality


@pytest.mark.parametrize(
    ("given", "what", "may_be"),
    [
        (acquisition("SE", 500, 12, description="SAG T1 CAL"), "calibration", "t1n"),
        (acquisition("SE", 500, 12, agent=True, description="T1 GD LOC"), "localiser", "t1c"),
        (acquisition("GR", 5, 2, agent=True, description="T1 VIBE POST PERF"), "perfusion", "t1c"),
        (acquisition("GR", 5, 2, description="T1 VIBE DCE"), "perfusion", "t1n t1c"),
        (acquisition("GR", 5, 2, agent=True, description="T1 VIBE venous"), "vessels", "t1c"),
        (acquisition("SE", 4500, 95, description="T2 TSE diff"), "diffusion", "t2w"),
        (acquisition("SE", 4500, 95, kinds="ORIGINAL;PRIMARY", description="T2 SUB"), "subtraction", "t2w"),
        (acquisition("SE", 4500, 95, description="AX T2 STAR"), "susceptibility", "t2w"),
        (acquisition("SE", 4000, 90, description="MAGiC T2"), "synthetic", "t2w"),
        (acquisition("SE", 4000, 90, description="AX T2", kinds="DERIVED;SYNTHETIC"), "synthetic", "t2w"),
        (acquisition(description="SyMRI FLAIR"), "synthetic", "t2f"),
        (acquisition(agent=True, description="T1 arteritis"), "vessels", "t1c"),
        (acquisition(description="T1 post GD perf"), "perfusion", "t1c"),
        (acquisition(description="BRAIN MAP T1"), "map", "t1n"),
        (acquisition("SE", 500, 12, description="AX T1 TTP"), "perfusion", "t1n t1c"),
        (acquisition("SE", 500, 12, description="T1 SUB"), "subtraction", "t1n"),
        (acquisition("GR", 9, 2.5, description="T1 VIBE nach TOF"), "angiogram", "t1n"),
        (acquisition(agent=True, description="T1 MRV"), "angiogram", "t1c"),
        (acquisition(description="T2 perf"), "perfusion", "t2w"),
        (acquisition("SE", 4500, 95, description="tra HASTE venous"), "vessels", "t2w"),
        (acquisition(*MPRAGE[0], **MPRAGE[1], description="SAG 3D dyn"), "times", "t1n t1c"),
        (acquisition("GR", 5, 2.3, description="T1 VIBE", flip_degrees=7), "flip angle of 7°", "t1n"),
        (acquisition("GR", 5, 2.3, description="STARVIBE", agent=True, flip_degrees=7), "proton density", "t1c"),
    ],
)
def test_a_word_against_all_else_leaves_a_doubt(given, what, may_be):
    verdict = recognise_contrast(given)
    assert (verdict.modality, verdict.reason, verdict.may_be) == (None, "denied", {*may_be.split()})
    assert what in verdict.why


MADE = {"kinds": "DERIVED;PRIMARY;M", "agent": True}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        *(
            (acquisition("GR", 5, 1.7, description=text, **MADE), "perfusion")
            for text in ("Ktrans", "iAUC", "TTP", "PEI", "Wash-in", "Kep", "Tissue4D_Ve", "rCBV", "CBF", "MTT", "TMAX")
        ),
        *((acquisition(description=text), "susceptibility") for text in ("AX T2 STAR", "t2_star_tra", "T2 AX GRAD")),
        *((acquisition(description=text), "susceptibility") for text in ("T2 GRADIENT ECHO", "T2 HEMOFLASH", "GRE T2")),
        *(
            (acquisition("SE", 6000, 80, description=text), "diffusion")
            for text in ("AX PROPELLER B1000", "AX B=1000", "dADC (mm2/s)", "Fractional Aniso.", "ADC map", "DWI")
        ),
        (acquisition("GR", 3.15, 1.37, agent=True, description="AAHScout"), "localiser"),
        (acquisition("GR", 8, 3, variants=MP, description="Survey"), "localiser"),
        (acquisition("GR", 23, 3.5, variants=MP, description="TOF"), "angiogram"),
        (acquisition("GR", 5, 2.3, description="VIBE", flip_degrees=7), "proton density"),
        *((acquisition("GR", 5, 2, kinds="ORIGINAL", description=text), "perfusion") for text in ("Ve", "kep", "TTP")),
        *((acquisition("IR", 3000, 10, 400, description=text), "keeps the sign") for text in ("PSIR", "T1 PSIR")),
        *(
            (acquisition("GR", 5, 1.7, description=text), "relaxation times")
            for text in ("T1 MAPPING FA 15", "QMAP T1", "T1 rho", "qT1")
        ),
        (acquisition("SE", 4500, 95, description="T2 brain mask", **MADE), "mask"),
        (acquisition("SE IR", 9000, 110, 2500, description="FLAIR change map", **MADE), "map"),
        (acquisition("SE", 500, 12, description="BRAIN MAP T1", **MADE), "map"),
        (acquisition("SE IR", 9000, 110, 2500, description="FLAIR*"), "too"),
        *((acquisition("GR", 8, 3, description=text), "calibration") for text in ("asset", "Ref_Head", "ASSET cal 2")),
        (acquisition("GR", 400, 0.016, description="oZTEo"), "short echo"),
        (acquisition(description="Anon SYNTHETIC FLAIR (crossmr)"), "itself synthetic"),
    ],
)
def test_maps_and_calibrations_are_no_anatomy_and_leave_no_doubt(given, why):
    verdict = recognise_contrast(given)
    assert (verdict.modality, verdict.may_be) == (None, frozenset())
    assert why in verdict.why


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        (acquisition("GR", 5, 1.7, description="t1_vibe_tra_fa2", flip_degrees=2), None),
        (acquisition("GR", 5, 1.7, description="SPGR FA 3", flip_degrees=3), None),
        (acquisition("GR", 5, 1.7, description="t1_vibe_tra_fa15", flip_degrees=15), "t1n"),
        (acquisition("GR", 7, 3, 450, flip_degrees=7), "t1n"),
        (acquisition("GR", 2530, 1.6, flip_degrees=7), "t1n"),
        (acquisition("GR", 7, 3, variants="MP", flip_degrees=7), "t1n"),
        (acquisition("GR", 7, 3, description="T1 3D TFE", flip_degrees=7), "t1n"),
        (acquisition("GR", 7, 3, flip_degrees=0), "t1n"),
        (acquisition("SE", 500, 12, flip_degrees=5), "t1n"),
    ],
)
def test_a_gradient_echo_of_a_small_flip_angle_is_no_t1(given, modality):
    verdict = recognise_contrast(given)
    assert verdict.modality == modality
    assert modality or "proton density" in verdict.why


@pytest.mark.parametrize(
    ("description", "agent", "modality", "against"),
    [
        ("T1 BASAL", True, "t1c", "against its description"),
        ("T1 CONTRAST", False, "t1n", "against its description"),
        ("T1 CONTRAST", None, "t1c", ""),
        ("T1 SIMPLE", None, "t1n", ""),
        ("T1 nativ", True, "t1n", "before"),
        ("T1 WITH CONTRAST", False, "t1c", "against its tag"),
    ],
)
def test_words_that_may_mean_something_else_overrule_no_tag(description, agent, modality, against):
    verdict = recognise_contrast(acquisition("SE", 500, 12, agent=agent, description=description))
    assert verdict.modality == modality
    assert against in verdict.why


def test_names():
    assert names("t1_mprage", "t1c")
    assert not names("Ktrans", "t1c")
    assert names("dark fluid", "t2f")


T1, GD = acquisition("SE", 500, 12), acquisition("SE", 500, 12, description="T1 GD")
T2, FLAIR = acquisition("SE", 5000, 100), acquisition("SE IR", 9000, 120, 2500)


@pytest.mark.parametrize(
    ("study", "modalities"),
    [
        ((T1, T2, FLAIR, GD), "t1n t2w t2f t1c"),  # by the description
        ((T1, T2, FLAIR, T1), "t1n t2w t2f t1c"),  # by the order
        ((GD, T2, T1), "t1c t2w t1c"),  # acquired after the agent was given
        ((T1, T2), "t1c t2w"),
        ((T2, T1, T1), "t2w t1c t1c"),  # no order tells
        ((T1, T1), "t1c t1c"),
    ],
)
def test_an_agent_on_every_series_is_resolved(study, modalities):
    resolved = resolve_agents([replace(given, agent=True) for given in study])
    assert [recognise_contrast(given).modality for given in resolved] == modalities.split()


@pytest.mark.parametrize(
    ("study", "why"),
    [
        ((T1, T2, T1), "agent named on every series; plain by order"),
        ((T1, T2, GD), "agent named on every series; before the one whose description names it"),
    ],
)
def test_the_reason_says_that_the_agent_is_on_every_series(study, why):
    first = resolve_agents([replace(given, agent=True) for given in study])[0]
    assert recognise_contrast(first).why.endswith(why)


SIMPLE, CONTRAST = (replace(T1, description=text) for text in ("T1 SIMPLE", "T1 CONTRAST"))


@pytest.mark.parametrize(
    ("study", "agents", "modalities"),
    [
        ((SIMPLE, T2, T1), (True, None, True), "t1n t2w t1c"),
        ((SIMPLE, T2), (True, True), "t1n t2w"),  # typed in for the examination
        ((SIMPLE, T2), (True, None), "t1c t2w"),
        ((SIMPLE, SIMPLE, T2), (True, True, None), "t1c t1c t2w"),
        ((T1, T2, CONTRAST), (False, False, False), "t1n t2w t1c"),  # the console's NONE
        ((T1, T2, CONTRAST), (None, None, False), "t1n t2w t1c"),  # a clock that is late
        ((CONTRAST, T2), (False, False), "t1n t2w"),
        ((T1, T2, CONTRAST), (True, None, False), "t1c t2w t1n"),
    ],
)
def test_such_words_count_where_tags_tell_no_t1_apart(study, agents, modalities):
    resolved = resolve_agents([replace(one, agent=agent) for one, agent in zip(study, agents, strict=True)])
    assert [recognise_contrast(given).modality for given in resolved] == modalities.split()


def test_an_unknown_word_is_an_agent_where_other_series_lack_it():
    assert [a.agent for a in resolve_agents([T1, T2, replace(T1, unclear=True)])] == [None, None, True]
    assert [a.agent for a in resolve_agents([replace(a, unclear=True) for a in (T1, T2, T1)])] == [None, None, None]


@pytest.mark.parametrize(
    ("part", "description", "shown"),
    [
        *(("", "AX T1", 2), ("BRAIN", "AX T1", 2), ("HEAD", "", 2), ("SPINE", "T1 BRAIN", 2), ("REMOVED", "", 2)),
        *(
            ("BRAIN", "COR T1 SELLA GD", 1),
            ("", "T1 ORBITS", 1),
            ("", "IAC", 1),
            ("", "hipófisis", 1),
            ("PITUITARY", "", 1),
        ),
        *(("CSPINE", "SAG T1", 0), ("BRAIN", "SAG T1 C-SPINE", 0), ("KNEE", "", 0), ("", "T2 HWS sag", 0)),
        *(("HEAD", "SAG T2 CSP", 0), ("BRAIN", "T2 SAG C-SP", 0), ("", "t2 tse hals", 0), ("BRAIN", "T2 cuello", 0)),
        *(("", "T1 CAROTID", 0), ("", "T2 Kopf Hals", 2), ("", "T1 brain neck", 2)),
        *(("CAROTID", "AX T1", 2), ("", "AX T2 TSP", 2)),  # of an examination of both; of a TSE
    ],
)
def test_what_of_the_head_a_series_shows(part, description, shown):
    assert covers(part, description) == shown


@pytest.mark.parametrize("text", ["Loc Sag SSFSE", "SURVEY BRAIN HASTE", "pCASL", "fMRI rest"])
def test_a_spin_echo_that_is_called_something_else_and_no_contrast_is_left_out_without_a_doubt(text):
    told = recognise_contrast(acquisition("SE", 4000, 80, description=text))
    assert (told.modality, told.reason) == (None, "")
