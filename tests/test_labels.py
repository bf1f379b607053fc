"""Lesion labels of BraTS, of one year and of another."""

import nibabel as nib
import numpy as np
import pytest
from conftest import ellipsoid, image, write_study

from crossmr.data.labels import as_counted, not_a_lesion, note_on
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


def test_what_covers_the_head_or_lies_outside_is_no_lesion():
    head, lesion, size = ellipsoid(), np.zeros(ellipsoid().shape, np.uint8), (1, 1, 1)
    assert not_a_lesion(lesion, head, size) == ""  # a head without any
    lesion[10:14, 14:18, 10:13] = 3
    assert not_a_lesion(lesion, head, size) == ""
    brain = head.astype(np.uint8)
    assert not_a_lesion(brain, head, size).startswith("it covers more than 40% of the head")
    assert not_a_lesion(brain * (1 + np.arange(24, dtype=np.uint8) % 3), head, size).startswith(
        "it covers more than 60% of the head"
    )
    half = np.where(np.arange(32)[:, None] > 15, 0, brain)
    assert 0.4 * head.sum() < half.sum() < 0.6 * head.sum()
    assert not_a_lesion(half, head, size)
    half[half > 0] = 1 + (np.argwhere(half).sum(1) % 2)  # a tumour and its oedema
    assert not_a_lesion(half, head, size) == ""
    air = (slice(0, 4), slice(0, 4), slice(0, 4))
    assert not head[air].any()
    lesion[air] = 1
    assert not_a_lesion(lesion, head, (2, 2, 2)) == "10% or more of it lies outside the head"
    assert not_a_lesion(lesion, head, (0.1, 0.1, 0.1)) == ""  # within 6 mm


@pytest.mark.parametrize("radius", [2.1, 7, 15])
def test_lesions_at_the_surface_are_lesions(radius):
    """Small ones at the edge; cavities that open to the surface, which is outside the head."""
    z, y, x = np.indices((64, 64, 64)) - 32
    head, distance = z**2 + y**2 + x**2 < 28**2, np.sqrt(z**2 + y**2 + (x - 27) ** 2)
    lesion = distance < radius
    if radius > 6:
        lesion, head = lesion & head, head & (distance >= radius - 1)
    assert (lesion & ~head).sum() >= 0.1 * lesion.sum()
    assert not_a_lesion(lesion.astype(np.uint8), head, (1, 1, 1)) == ""


@pytest.mark.parametrize("tissues", [False, True])
def test_a_brain_mask_and_tissues_are_no_label(tmp_path, tissues):
    """HD-BET's `_mask`, or FAST's `_seg` with 1 CSF, 2 grey and 3 white matter."""
    write_study(tmp_path, "P1", ("t1n", "t2w"))
    brain = ellipsoid().astype(np.uint8)
    nib.save(image(brain * (1 + np.arange(24, dtype=np.uint8) % 3) if tissues else brain), tmp_path / "P1/P1_seg.nii")
    (files,) = find_studies(tmp_path)
    study = load_study(files)
    assert (study.labels, study.label_values) == (None, ())
    (note,) = study.notes
    share = 60 if tissues else 40
    assert note.startswith(f"the segmentation *_seg.nii is not used: it covers more than {share}% of the head")


def test_the_values_of_the_file_are_known(tmp_path):
    write_study(tmp_path, "BraTS-GLI-02405-100", ("t1n", "t2w"), lesion=True)
    (files,) = find_studies(tmp_path)
    assert load_study(files).label_values == (3,)
