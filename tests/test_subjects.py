"""The studies of an evaluation: what is read of each, and what is hidden."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, Listener, image, make_head, write_study

from crossmr.data.naming import find_studies
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.errors import ConfigError, NamingError, StudyError
from crossmr.evaluation.evaluate import say_notes
from crossmr.evaluation.subjects import Subject, find_subjects, patterns, subject_of_files

ALL = ("t1n", "t2w", "t1c", "t2f")
FIXED = SimpleNamespace(sources=("t1n", "t2w"), targets=("t1c", "t2f"), modalities=ALL, any_subset=False)
ANY = SimpleNamespace(sources=ALL, targets=ALL, modalities=ALL, any_subset=True)


def subject_with(*modalities):
    return Subject("P", "P", dict.fromkeys(modalities), {}, None, None, None)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    for seed, case in enumerate(("Ann", "Bob", "Cem", "Dan")):
        write_study(folder, case, ALL, seed=seed, lesion=case != "Dan")
    return folder


def test_a_study_is_cropped_to_its_head_and_normalised(cohort):
    subjects = {name: read() for name, read, *_ in find_subjects(cohort)}
    assert list(subjects) == ["Ann", "Bob", "Cem", "Dan"]
    ann = subjects["Ann"]
    assert (ann.name, ann.patient, ann.spacing_mm) == ("Ann", "Ann", (7.0, 6.0, 6.0))
    assert set(ann.volumes) == set(ALL)
    for volume in (*ann.volumes.values(), ann.head, ann.tumour, ann.enhancing):
        assert volume.shape == ann.head.shape
    for volume in ann.volumes.values():
        assert volume.dtype == np.float32
        assert volume.flags["C_CONTIGUOUS"]
        assert 0 <= volume.min() < volume.max() <= 1
    assert ann.tumour.sum() == 4 * 4 * 3
    assert ann.head[ann.tumour].all()
    assert not subjects["Dan"].tumour.any()
    assert set(ann.air) == set(ALL)
    for modality, volume in ann.volumes.items():
        assert np.median(volume[ann.head]) == pytest.approx(1 / 3, abs=0.02)
        assert np.median(volume[~ann.head]) == pytest.approx(max(ann.air[modality], 2**-10), abs=0.05)


def test_the_enhancing_part_has_the_last_labels(tmp_path):
    """1 necrosis, 2 oedema, 3 non-enhancing and 4 enhancing, as BraTS had them until 2015."""
    labels = np.zeros(SHAPE, np.uint8)
    for label, x in ((1, 10), (2, 12), (3, 14), (4, 16)):
        labels[x : x + 2, 14:18, 10:13] = label
    write_study(tmp_path / "cohort", "P", ALL, replace={"seg": labels})
    listener = Listener()
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(1.0, 0.0, 0.0)), display=listener)
    assert any(line.startswith("note on P: its labels 3 and 4 are read as BraTS had them") for line in listener.said)
    for folder, split in {"cohort": None, "set": "train"}.items():
        ((_, read, *_),) = find_subjects(tmp_path / folder, split)
        subject, said = read(), Listener()
        assert say_notes(subject, said) is subject
        assert said.said == ([] if split else [f"P: {note}" for note in subject.notes])
        assert any("its labels 3 and 4" in line for line in said.said) == (split is None)
        assert (subject.tumour.sum(), subject.enhancing.sum()) == (4 * 24, 24)
        assert subject.enhancing[..., np.flatnonzero(subject.tumour.any((0, 1)))[-2:]].sum() == 24


def test_a_prepared_dataset_and_its_cohort_give_the_same_subjects(cohort, tmp_path):
    manifest = prepare(cohort, tmp_path / "set", PrepareSettings(split=Split(0.5, 0.0, 0.5, seed=0)))
    of_cohort = {name: read() for name, read, *_ in find_subjects(cohort)}
    for split in ("train", "test"):
        of_set = {name: read() for name, read, *_ in find_subjects(tmp_path / "set", split)}
        assert 0 < len(of_set) < len(of_cohort)
        assert list(of_set) == manifest["split"][split]
        for name, subject in of_set.items():
            other = of_cohort[name]
            assert (subject.patient, subject.spacing_mm) == (other.patient, other.spacing_mm)
            np.testing.assert_array_equal(subject.head, other.head)
            np.testing.assert_array_equal(subject.tumour, other.tumour)
            assert subject.air == other.air
            for modality in ALL:
                np.testing.assert_allclose(subject.volumes[modality], other.volumes[modality], atol=5e-4)  # float16
    assert find_subjects(tmp_path / "set", "val") == []
    with pytest.raises(ConfigError, match="tset"):
        find_subjects(tmp_path / "set", "tset")
    with pytest.raises(ConfigError, match=r"--split is for a prepared set: of .*, a folder of studies, all are"):
        find_subjects(cohort, "val")
    with pytest.raises(ConfigError, match="--map and --register are for a folder of studies"):
        find_subjects(tmp_path / "set", None, {"t1n": "*"}, "always")


def test_a_table_of_patients_may_list_more_than_the_folder_has(cohort, tmp_path):
    (study, *_) = find_subjects(cohort)
    (table := tmp_path / "patients.csv").write_text(f"case,patient\n{study.name},Ann\nZ9,Ann\n")
    with pytest.raises(ConfigError, match="there is no study 'Z9'"):
        find_subjects(cohort, patients=table)
    said = []
    (found, *_) = find_subjects(cohort, patients=table, say=said.append)
    assert found.read().patient == "Ann"
    assert [line.startswith("warning: 1 line names a study that is not there in") for line in said] == [True]


def test_a_mapping_names_the_files(tmp_path):
    for modality, name in {"t1n": "MPRAGE", "t2w": "TSE"}.items():
        nib.save(image(make_head(modality)), tmp_path / f"P_{name}.nii.gz")
    ((name, read, *_),) = find_subjects(tmp_path, None, {"t1n": "*_MPRAGE*", "t2w": "*_TSE*"})
    assert name == "P"
    assert set(read().volumes) == {"t1n", "t2w"}


def test_volumes_on_other_grids_are_registered_only_if_asked(tmp_path):
    write_study(tmp_path, "P", ("t1n",))
    shifted = np.diag([6.0, 6.0, 7.0, 1.0])
    shifted[0, 3] = 6
    nib.save(image(make_head("t2w"), shifted), tmp_path / "P" / "P-t2w.nii.gz")
    (files,) = find_studies(tmp_path)
    with pytest.raises(StudyError, match="placed elsewhere"):
        subject_of_files(files)
    assert set(subject_of_files(files, "if needed").volumes) == {"t1n", "t2w"}


def test_a_folder_without_studies_is_refused(tmp_path):
    with pytest.raises(NamingError, match=r"no volume"):
        find_subjects(tmp_path)


def test_a_fixed_model_is_given_its_sources():
    assert patterns(FIXED, subject_with(*ALL)) == [("t1n", "t2w")]
    assert patterns(FIXED, subject_with("t2f", "t2w", "t1n")) == [("t1n", "t2w")]
    with pytest.raises(StudyError, match="P: cannot be measured: it lacks t2w"):
        patterns(FIXED, subject_with("t1n", "t1c"))
    with pytest.raises(StudyError, match="P: cannot be measured: it has none of t1c, t2f"):
        patterns(FIXED, subject_with("t1n", "t2w"))


@pytest.mark.parametrize("acquired", [("t1n", "t1c"), ("t1n", "t2w", "t2f"), ALL])
def test_every_subset_is_each_non_empty_proper_one(acquired):
    one_out = patterns(ANY, subject_with(*acquired))
    assert {frozenset(acquired) - set(sources) for sources in one_out} == {frozenset([m]) for m in acquired}
    every = patterns(ANY, subject_with(*acquired), every_subset=True)
    assert len(every) == len(set(every)) == 2 ** len(acquired) - 2
    assert all(0 < len(sources) < len(acquired) and set(sources) < set(acquired) for sources in every)
    with pytest.raises(StudyError, match="it has not two of t1n, t2w, t1c, t2f"):
        patterns(ANY, subject_with("t1n"))


def test_modalities_that_the_model_does_not_know_are_not_sources():
    three = SimpleNamespace(sources=ALL[:3], targets=ALL[:3], modalities=ALL[:3], any_subset=True)
    assert patterns(three, subject_with("t2f", "t1c", "t1n")) == [("t1n",), ("t1c",)]


def test_a_synthetic_volume_is_no_truth(tmp_path):
    write_study(tmp_path, "P", ("t1n", "t2w"))
    fake = image(make_head("t2f"), description="SYNTHETIC t2f by crossmr")
    nib.save(fake, tmp_path / "P" / "P-t2f.nii.gz")
    ((_, read, *_),) = find_subjects(tmp_path)
    with pytest.raises(StudyError, match="it has none of t1c, t2f"):
        patterns(FIXED, read())
