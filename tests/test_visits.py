"""Time points in names: taken away where they are some, left where they may be the patient."""

import pytest

from crossmr.data.visits import after_time_point, is_dated, is_visit, look_alike, may_repeat, parse_patient


@pytest.mark.parametrize(
    ("visits", "patient", "confidence"),
    [
        (
            "PAT001_2019-03-01 PAT001_2020_04_02 PAT001_20210503 PAT001_01.02.2022 PAT001_20190301_143210",
            "PAT001",
            "sure",
        ),
        ("PatientID_0003_Timepoint_1 PatientID_0003_Timepoint_2 PatientID_0003", "PatientID_0003", "sure"),
        ("P01_baseline P01-followup P01.fu2 P01_follow-up P01_early-followup", "P01", "sure"),
        ("P01_preop P01_post-op P01_postoperative P01_pre P01_post P01_recurrence", "P01", "sure"),
        ("P01_visit2 P01_Visit-3 P01_week-040 P01_week-000-1 P01_6months P01_month3 P01_tp1 P01_day-7", "P01", "sure"),
        ("P01_visit2_2019-03-01 P01_baseline_preop", "P01", "sure"),
        ("sub-01_ses-02 sub-01_ses-preop sub-01", "sub-01", "sure"),
        ("baseline_P01 followup_P01 week-4_P01 2019-03-01_P01 20190301_1432_P01 pre_P01 post-op_P01", "P01", "sure"),
        (
            "P01_2019-03-01_MRI P01_baseline_3T P01_preop_scan P01_visit_1_MRI P01_tp1_1.5T P01_pre-RT_MRI",
            "P01",
            "sure",
        ),
        ("MRI_preop_P01 2019-03-01_1.5T_P01 scan_baseline_P01 early_postop_P01 P01_early_postop", "P01", "sure"),
        ("ses-1_sub-01 visit2_sub-01 baseline_sub-01_ses-3", "sub-01", "sure"),
        ("20190301_DOE_JOHN 20200301_DOE_JOHN", "DOE_JOHN", "weak"),
        ("20190301_UCSF-0001 baseline_UCSF-0001", "UCSF-0001", "sure"),
        ("20190301_OAS30001 20200301_OAS30001 ses-1_OAS30001", "OAS30001", "sure"),
        ("20190301_1234567 20200301_1234567", "1234567", "weak"),
        ("UCSF-PDGM-0429 UCSF-PDGM-0429_FU001d", "UCSF-PDGM-0429", "sure"),
        ("BraTS-GLI-00000-000 BraTS-GLI-00000-001", "BraTS-GLI-00000", "fair"),
        ("UPENN-GBM-00001_11 UPENN-GBM-00001_21", "UPENN-GBM-00001", "fair"),
        ("P01_T0 P01_T1 P01_v2 P01_m12 P01_d3 P01_scan1 P01_scan2 P01_MR1", "P01", "weak"),
        ("UCSD-PTGBM-0002_01 UCSD-PTGBM-0002_02", "UCSD-PTGBM-0002", "weak"),
        ("BraTSReg_002_00_0000 BraTSReg_002_01_0262", "BraTSReg_002", "weak"),
        ("20190301_GE3T 20200301_GE3T", "GE3T", "weak"),
        ("baseline_01_P003 baseline_02_P003", "P003", "weak"),
        ("DOE_JOHN_20190301 DOE_JOHN_20200301", "DOE_JOHN", "weak"),
    ],
)
def test_the_visits_of_a_patient(visits, patient, confidence):
    readings = [parse_patient(name) for name in visits.split()]
    assert {reading.patient for reading in readings} == {patient}
    assert {reading.confidence for reading in readings} - {"sure"} <= {confidence}
    assert readings[0].confidence == confidence


@pytest.mark.parametrize(
    "names",
    [
        "P1_T1 P2_T1",
        "sub-01 sub-02 sub-m12 sub-visit1 sub-T0",
        "BraTS-GLI-00000-000 BraTS-GLI-00001-000 BraTS-PED-00000-000",
        "P01_MRI P01_3T P01 GBM_M12_MRI GBM_M13_MRI",
        "IXI012-HH-1211 IXI013-HH-1212 IXI002-Guys-0828",
        "Brats18_2013_11_1 Brats18_2013_2_1 Brats18_TCIA01_131_1 BraTS20_Training_355 BraTS20_Training_356",
        "TCGA-02-0003 TCGA-02-0006 TCGA-06-1987 TCGA-06-2001",
        "GBM_M12 GBM_M13 hospital_scan1 hospital_scan2 hospital_V1",
        "baseline_P1 baseline_P2 post_contrast pre_contrast GBM_P01 V1_P01 2019_P01 siteA_P01",
        "BASE-01-007 BASE-02-007 BASE-01-008 PRE-01-007 PRE-02-007 TIME-01-007 TIME-02-007 TP53_001 TP54_001",
        "FU_2019_001 FU_2020_001 20190301_F_33 20190401_F_33 20190301_M-045Y 20190401_M-045Y post_01_A pre_01_A",
        "patient19 patient20 W39_1998.09.19 W40_1998.09.19 REAL-001 REAL-002 A1 B1",
    ],
)
def test_different_patients_stay_apart(names):
    patients = [parse_patient(name).patient for name in names.split()]
    assert len(set(patients)) == len(patients)
    assert all(patients)


@pytest.mark.parametrize(
    "name",
    [
        "baseline",
        "followup",
        "T0",
        "m12",
        "2019-03-01",
        "week-040",
        "MR_2019-03-01",
        "scan_baseline",
        "20190301_Brain_3T",
        "3T_20190301",
        "20190301_1.5T",
    ],
)
def test_a_name_that_is_a_time_point_names_no_patient(name):
    assert parse_patient(name).patient == ""


def test_what_may_be_a_time_point_is_pointed_out():
    assert {look_alike(name) for name in ("P01_A", "P01_B", "P01_2019", "P01_7")} == {"P01"}
    assert {look_alike(name) for name in ("Ann_T0", "Ann_T1")} == {"Ann"}
    assert {look_alike(name) for name in ("P01a", "P01B")} == {"P01"}
    for name in ("P01", "sub-01", "TCGA-02-0003", "Ann_Bee", "P01_T0", "BraTS-GLI-00000-000", "IXI012-HH-1211"):
        assert look_alike(name) == "", name


def test_a_visit_is_a_time_point_and_nothing_else():
    assert all(map(is_visit, ("baseline", "2019-03-01", "ses-1", "preop", "timepoint1", "week4_2019-03-01")))
    assert not any(map(is_visit, ("V1", "T0", "2019", "baseline_P01", "images", "")))
    assert is_dated("2019-03-01")
    assert not is_dated("baseline")


def test_what_follows_a_time_point():
    names = ("BASE-01-007", "20190101_101500", "week1_P01", "sub-01_x", "P01_baseline", "baseline")
    assert [after_time_point(name) for name in names] == ["007", "101500", "P01", "", "", ""]


def test_what_may_stand_before_a_patient():
    assert all(may_repeat(first, "P01") for first in ("V1", "2019", "siteA", "site_2", "train", "test1", "own"))
    assert may_repeat("P02", "series3") is None
    assert not any((may_repeat("V1", "V2"), may_repeat("siteA", "T0"), may_repeat("HC", "12"), may_repeat("Ann", "op")))
    assert may_repeat("train", "12")
    assert not may_repeat("training01", "01")  # a patient and a visit
    assert may_repeat("training01", "P01")
