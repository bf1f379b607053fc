"""The list of a run's studies is read as it was written."""

import shutil

from crossmr.completion.inputs import Inputs, find_inputs
from crossmr.completion.listing import read_cases, read_listing, write_listing
from crossmr.completion.unread import Unread
from crossmr.parts import Part


def test_the_list_of_a_run_is_read_as_it_was_written(tmp_path, cohort):
    shutil.copytree(cohort, tmp_path / "in\udcff")
    found = find_inputs([tmp_path / "in\udcff"])
    beside = {"Bob": [tmp_path / "in\udcff" / "Bob" / "Bob-t2f.nii.gz.part"]}
    dicom = {"Cem": [Unread("series 4", frozenset({"t2f", "t2w"}), "is DICOM")]}
    given = Inputs(found.root, found.studies, beside=beside, dicom=dicom, faults={"Eve": "no place"})
    write_listing(tmp_path / "list", given)
    assert [*read_cases(tmp_path / "list")] == ["Ann", "Bob", "Cem", "Dan", "Eve"]
    whole = read_listing(tmp_path / "list", Part(1, 1))
    assert (whole.root, whole.beside, whole.dicom, whole.faults) == (given.root, beside, dicom, given.faults)
    assert [files.files() for files in whole.studies] == [files.files() for files in found.studies]
    second = read_listing(tmp_path / "list", Part(2, 3))
    assert ([files.case for files in second.studies], second.faults) == (["Bob", "Eve"], given.faults)
    assert (second.beside, second.dicom) == (beside, {})
