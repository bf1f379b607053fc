"""What the words of one name say."""

import pytest

from crossmr.data.words import LABEL, describes, holds_labels, is_raw, possible_contrasts, read_words, spelt


@pytest.mark.parametrize(
    ("names", "head", "meaning"),
    [
        # glued words, and those of other languages and programs
        ("3DT1 3D_T1 T1_MPRAGE MPRAGE T1w_SPGR T1_3D Sag_3D_BRAVO T1SAG rT1 T1_nogd T1_pre T1_IR", "", "t1n"),
        ("CT1 3DT1GADO T1gd T1WKS T1_contrast T1postgad post_T1 T1+C T1_MPRAGE_GD T1w_post_3D", "", "t1c"),
        ("T2 T2_TSE T2TSE T2_FSE_AX axial_T2 Sag_3D_T2_SPACE T2_to_T1 rT2 T2_bet", "", "t2w"),
        ("FLAIR 3DFLAIR T2_FLAIR T2FLAIR FLAIR_SAG FLAIR_cor FLAIR_CUBE", "", "t2f"),
        ("DP PD PDw PD_TSE pd_pp", "", "pdw"),
        # names that converters make of a scanner's protocols
        (
            "t1_mprage_sag_p2_iso 3_t1_mprage_sag_p2_iso T1_VIBE T1_MPR T1_FLASH t1_se_tra_fl2d T1_no_contrast",
            "",
            "t1n",
        ),
        (
            "T1_ohne_KM t1_nativ T1_sans_injection T1_sin_contraste T1_sem_contraste T1w_without T1_wo_contrast",
            "",
            "t1n",
        ),
        (
            "5_t1_mprage_sag_p2_iso_KM T1_TSE_KM T1_mit_KM T1_MPR_GD T1_VIBE_POST T1w_GADOVIST T1_fat_sat_post_gad",
            "",
            "t1c",
        ),
        ("T1_with_contrast T1_con_contraste T1_mdc T1_avec_gadolinium T1_contrast_agent T1_iv_contrast", "", "t1c"),
        ("4_t2_tse_tra_448_p2 T2_HASTE t2_tse_fs_tra_3mm T2_hires T2_fat_sat", "", "t2w"),
        ("6_t2_tirm_tra_dark-fluid t2_spc_flair T2_darkfluid FLAIR_fat_sat", "", "t2f"),
        # steps, copies and spaces
        ("P1_FLAIR_bet P1_FLAIR_n4 P1_FLAIR_brain P1_FLAIR_1 P1-FLAIR_run2 P1_FLAIR_N4_noise_reduced", "P1", "t2f"),
        ("P1_FLAIR_(1) P1_FLAIR_copy P1_FLAIR_defaced P1_FLAIR_SAG_3D_bet_1 P1_FLAIR_r2s_bet_reg", "P1", "t2f"),
        ("P1_FLAIR_to_T1 P1_FLAIR2T1 P1_FLAIR_in_T1_space P1_FLAIR_reg_T1 P1_FLAIR_to_MNI152 P1_rFLAIR", "P1", "t2f"),
        ("P1_FLAIR_to_T1_brain P1_FLAIR_on_T1ce P1_brain_FLAIR P1_reg_FLAIR P1_FLAIR_coreg_to_T1", "P1", "t2f"),
        ("P1_T1_FLAIR P1_T1FLAIR P1_T1_C- P1_pre_T1", "P1", "t1n"),
        ("P1_T1_C+ P1_T1_C P1-t1-ce P1.T1.Gd P1_post_T1 P1_T1ce_pre P1_post_T1ce P1_post_T1c", "P1", "t1c"),
        ("P1_pre_T1ce P1_pre_T1Gd P1_pre_3DT1GADO P1_pre_T1c", "P1_pre", "t1c"),  # before surgery
        # numbers of series and of patients
        ("2_T1 12-T1", "", "t1n"),
        ("Tumor_01_T1 Tumor_01_T1_bet", "Tumor_01", "t1n"),
        ("W39_1998.09.19_T1", "W39_1998.09.19", "t1n"),
        # a second contrast belongs to the case
        ("P1_T2_T1", "P1_T2", "t1n"),
        ("P1_T1_T2", "P1_T1", "t2w"),
        # initials are no words of a sequence, nor an agent, where they stand before the contrast
        ("SE_T1", "SE", "t1n"),
        ("P1_C_T2", "P1_C", "t2w"),
        ("P1_KM_T1", "P1_KM", "t1n"),
        ("P2_T1", "P2", "t1n"),
        ("NO_T1", "NO", "t1n"),
        ("T2_P1_FLAIR", "T2_P1", "t2f"),
        # segmentations
        ("P2_seg P2_lesion_mask", "P2", LABEL),  # acceleration is no word but of a contrast
        ("P1_T1_p2_seg", "P1", LABEL),
        ("P1_seg P1_mask_FLAIR P1_FLAIR_lesion P1_T1_mask P1_consensus_gt P1_tumor_segmentation P1_mask1", "P1", LABEL),
        ("P1_T1_pred_seg P1_predicted_FLAIR_lesion P1_manual_seg", "P1", LABEL),
        ("P1_T1_bet_seg P1_FLAIR_bet_lesion_mask P1_bet_tumor", "P1", LABEL),
        ("mask_FLAIR wmh MASK ManualSegmentation_1 ground_truth lesion_T2 FLAIR_to_T1_mask", "", LABEL),
    ],
)
def test_names(names: str, head: str, meaning: str) -> None:
    for name in names.split():
        reading = read_words(name)
        assert (reading.head, reading.meaning) == (head, meaning), name
        assert reading.mask == (meaning == LABEL), name


@pytest.mark.parametrize(
    "names",
    [
        "T1_bias T2starw mt1 scan7 P_0000 P1_T2_star P1_T2s P1_T1map P1_T1_map T12 T11 PDT2",
        "FLAIR_gd P1_post_contrast_FLAIR P1_FLAIR_post T2_gd",  # enhanced, and not a T1
        "t2_xyz_flair T1_what_ever_T2 flair_xyz_mask",  # a contrast and words that are not known name no patient
        "P1_t2f_synthetic P1_T2Synth P1_T1_pred2 P1_T1_fast P1_T1_brain_pve_0 P1_SWI P1_ADC P1_DWI",
        "P1_T1_Gdbolus P1_T1_KM",
        "P1_FLAIR_pred P1_pred_T1 P1_synthetic_T1 T1ce_synth P1_T2_predicted_bet P1_T1_synthseg P1_FLAIR_manual",
        "T1_bet_mask P1_hdbet_mask P1_T1_synthstrip_mask FLAIR_skullstripped_mask",  # of the brain
        "P1_brain_mask brainmask T1_brain_mask head_mask P1_brain_parenchyma_segmentation csf_seg",
    ],
)
def test_names_that_say_no_known_contrast(names: str) -> None:
    assert {name: read_words(name).meaning for name in names.split() if read_words(name).meaning} == {}


def test_the_space_is_that_of_the_target() -> None:
    spaces = {
        name: read_words(name).space for name in ("FLAIR_to_T1", "T2_to_T1ce", "T1_to_MNI", "FLAIR2T1", "rT1", "T1")
    }
    assert spaces == {
        "FLAIR_to_T1": "t1n",
        "T2_to_T1ce": "t1c",
        "T1_to_MNI": "",
        "FLAIR2T1": "t1n",
        "rT1": "",
        "T1": "",
    }


@pytest.mark.parametrize(
    ("name", "visit", "head"),
    [
        ("P1_FLAIR_baseline", "baseline", "P1"),
        ("P1_T1_2019-03-01", "2019_03_01", "P1"),
        ("flair_time01_on_middle_space", "time01", ""),
        ("T1_week-040", "week_040", ""),
        ("T1_post", "", ""),
        ("P1_time1_T1", "", "P1_time1"),
    ],
)
def test_a_time_point_after_the_contrast(name: str, visit: str, head: str) -> None:
    assert (read_words(name).visit, read_words(name).head) == (visit, head)
    assert read_words(name).meaning


@pytest.mark.parametrize(
    ("name", "doubt", "head", "meaning"),
    [
        ("P1_T2_FLAIR", "visit", "P1_T2", "t2f"),
        ("P1_T1_FLAIR_bet", "visit", "P1_T1", "t2f"),
        ("P1_pre_T1", "agent", "P1_pre", "t1n"),
        ("post_T1", "agent", "post", "t1n"),
        ("P1_post_T1ce", "agent", "P1_post", "t1c"),
        ("P1_pre_T1ce", "", "P1_pre", "t1c"),
        ("7_T1", "number", "7", "t1n"),
        ("P1_T1", "", "P1", "t1n"),
        ("P1_T2FLAIR", "", "P1", "t2f"),
    ],
)
def test_what_a_name_leaves_open(name: str, doubt: str, head: str, meaning: str) -> None:
    assert read_words(name).doubt == doubt
    literal = read_words(name, literal=True)
    assert (literal.head, literal.meaning) == (head, meaning)


def test_plain_images_have_fewest_words_beside() -> None:
    names = ["T1", "T1_bet", "T1_n4_bet", "3DT1_n4_bet"]
    assert [read_words(name).extras for name in names] == [0, 1, 2, 3]


def test_what_was_synthesised_is_no_contrast_that_may_be_there() -> None:
    assert [possible_contrasts(name) for name in ("P1_FLAIR_pred", "P1_synth_T1", "P1_T1_auto")] == [
        frozenset(),
        frozenset(),
        frozenset({"t1n", "t1c"}),
    ]


def test_an_agent_alone_is_weak() -> None:
    assert [
        (read_words(name).meaning, read_words(name).weak) for name in ("P1_POST", "P1_PRE", "GADO_preprocessed")
    ] == [
        ("t1c", True),
        ("t1n", True),
        ("t1c", True),
    ]
    assert not read_words("P1_T1_POST").weak


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("T1 Gd", "t1c"), ("flair", "t2f"), ("seg", LABEL), ("swi", ""), ("mprage", ""), ("P1_T1", ""), ("post", "")],
)
def test_a_spelling_is_of_contrast_and_agent_alone(text: str, meaning: str) -> None:
    assert spelt(text) == meaning


def test_folders_that_say_what_their_files_are() -> None:
    of_steps = ("orig", "raw", "Raw_Data", "Preprocessed_Data", "registered", "skull_strip", "images_segm", "MNI_space")
    of_patients = ("P1", "Tumor_01", "P1_seg", "site1", "HGG", "baseline", "week-040", "T1", "pre", "Ann_brain", "x")
    assert [name for name in (*of_steps, *of_patients) if describes(name)] == [*of_steps]
    assert [is_raw(name) for name in ("orig", "Raw_Data", "pre", "P1")] == [True, True, False, False]


def test_folders_of_labels():
    yes = "labels labelsTr LabelsTs masks Tumor_Masks manual_seg ground_truth GT segmentations lesion-masks"
    no = "brain_masks T1_mask imagesTr P1_seg seg1x anat P1 brain labels_P1"
    assert {name for name in (*yes.split(), *no.split()) if holds_labels(name)} == {*yes.split()}
