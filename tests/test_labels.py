"""Lesion labels of BraTS, of one year and of another."""

import nibabel as nib
import numpy as np
import pytest
from conftest import image, write_study

from crossmr.data.labels import as_counted, note_on
from crossmr.data.naming import find_studies
from crossmr.data.study import load_study


@pytest.mark.parametrize(
    ("case", "given", "counted"),
    [
        ("P1", [0, 1], [0, 1]),
        ("Brats18_2013_23_1", [0, 1, 2, 4], [0, 1, 2, 4]),
        ("VSD.Brain.XX.O.MR_T1c.54193", [0, 1, 2, 3, 4], [0, 1, 2, 1, 4]),
        ("BraTS-GLI-00000-000", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("BraTS-GLI-02405-100", [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]),
        ("BraTS-MET-00002-000", [0, 2, 4], [0, 2, 0]),
        ("P1", [0, 255], [0, 1]),
        ("BraTS-GLI-02405-100", [0, 4, 7], [0, 0, 1]),
    ],
)
def test_what_enhances_is_3_or_4_and_a_cavity_is_no_lesion(case, given, counted):
    assert as_counted(np.array(given, np.uint8), case).tolist() == counted


def test_labels_that_may_be_of_two_years_are_said(tmp_path):
    for case in ("P1", "BraTS-GLI-02405-100"):
        write_study(tmp_path, case, ("t1n", "t2w"), lesion=True)
        path = tmp_path / case / f"{case}-seg.nii.gz"
        labels = np.asarray(nib.load(path).dataobj).copy()
        labels[5, 5, 5], labels[5, 5, 6] = 4, 1
        nib.save(image(labels.astype(np.uint8)), path)
    given, named = (load_study(files) for files in sorted(find_studies(tmp_path), key=lambda files: files.case)[::-1])
    assert ([*np.unique(given.labels)], [*np.unique(named.labels)]) == ([0, 1, 4], [0, 1, 3])
    assert ["as BraTS had them until 2015" in note for note in given.notes] == [True]
    assert named.notes == ()
    assert note_on({1, 2, 4}, "P1") == note_on({1, 2, 3}, "P1") == ""
    assert note_on([0, 255], "P1") == "its labels above 4 (255) count as lesion that does not enhance."
