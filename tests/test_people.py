"""Whose each study is, by the names of files and folders together."""

from pathlib import Path

import pytest

from crossmr.data.people import patients_by_name
from crossmr.data.tree import File, NamesInTree

ROOT = Path("/r")


def people(*files: str) -> dict[str, tuple[str, str, bool]]:
    """Case → patient, how sure that is, and whether others may be the same one."""
    names = NamesInTree([ROOT / file for file in files], None, ROOT)
    studies: dict[str, list[File]] = {}
    for path, reading in names.readings:
        studies.setdefault(names.case(path, reading), []).append((path, reading))
    found = patients_by_name(studies, names, ROOT)
    return {case: (one.name, one.confidence, bool(one.alike)) for case, one in found.items()}


def test_visits_in_names_and_in_folders_are_of_one_patient() -> None:
    found = people("P01_baseline_T1.nii", "P01_2019-03-01_T1.nii", "P02_T1.nii")
    assert {case: patient for case, (patient, _, _) in found.items()} == {
        "P01_baseline": "P01",
        "P01_2019-03-01": "P01",
        "P02": "P02",
    }
    found = people("baseline/P01/T1.nii", "followup/P01/T1.nii", "baseline/P02/T1.nii")
    assert sorted(patient for patient, _, _ in found.values()) == ["P01", "P01", "P02"]


def test_a_number_that_would_make_all_studies_one_patients_is_no_time_point() -> None:
    found = people(*(f"EORTC-26101-00{k}_T1.nii" for k in range(1, 5)))
    assert len({patient for patient, _, _ in found.values()}) == 4


@pytest.mark.parametrize("between", ["/", "_"])
def test_a_patient_of_more_visits_than_a_family_has_stays_one_where_the_name_is_a_person_s(between: str) -> None:
    found = people(*(f"2019-{month:02}-01{between}P01/T1.nii" for month in range(1, 13)), "P7/T1.nii", "P8/T1.nii")
    assert {patient for patient, _, _ in found.values()} == {"P01", "P7", "P8"}
    scanner = people(*(f"2019-{month:02}-01{between}GE3T/T1.nii" for month in range(1, 13)), "P7/T1.nii", "P8/T1.nii")
    assert len({patient for patient, _, _ in scanner.values()}) == 14
    assert all(confidence == "weak" and alike for case, (_, confidence, alike) in scanner.items() if "GE3T" in case)


def test_one_name_at_two_sites_is_two_patients_who_may_be_one() -> None:
    found = people("siteA/P01_T1.nii", "siteA/P02_T1.nii", "siteB/P01_T1.nii", "siteB/P03_T1.nii")
    assert [patient for patient, _, _ in found.values()] == ["siteA_P01", "siteA_P02", "siteB_P01", "siteB_P03"]
    assert {case for case, (_, _, alike) in found.items() if alike} == {"siteA_P01", "siteB_P01"}
