"""The list of a run's studies is read as it was written."""

import shutil

import pytest

from crossmr.completion.inputs import Inputs, find_inputs
from crossmr.completion.listing import read_cases, read_listing, write_listing
from crossmr.completion.unread import Unread
from crossmr.errors import OutputError
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


def test_a_process_reads_the_lines_of_its_part_alone(tmp_path, cohort):
    write_listing(tmp_path / "list", find_inputs([cohort]))
    lines = (tmp_path / "list").read_bytes().splitlines(keepends=True)
    (tmp_path / "list").write_bytes(b"".join([*lines[:2], b"#" * (len(lines[2]) - 1) + b"\n", *lines[3:]]))
    assert read_listing(tmp_path / "list", Part(1, 2)).cases == ["Ann", "Cem", "Eve"]
    with pytest.raises(OutputError, match="Delete it to have the studies listed again"):
        read_listing(tmp_path / "list", Part(2, 2))
