"""The nnU-Net dataset: every channel where dataset.json says, bit for bit, and labels without gaps."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, image, make_head, save_untrained, write_study

from crossmr.completion.cohort import complete_cohort
from crossmr.errors import OutputError, StudyError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.output.nnunet import export_nnunet

ALL_FOUR = ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Ann is whole and has an old BraTS label, Bob lacks T1ce and labels, Cem could not be completed."""
    root = tmp_path_factory.mktemp("nnunet")
    write_study(root / "in", "Ann", ALL_FOUR, lesion=True)
    label = root / "in" / "Ann" / "Ann-seg.nii.gz"
    old = np.asarray(nib.load(label).dataobj) // 3 * 4
    old[5, 5, 5] = 1
    nib.save(image(old.astype(np.uint8)), label)
    write_study(root / "in", "Bob", ("t1n", "t2w", "t2f"), seed=1)
    plain = root / "in" / "Bob" / "Bob-t2w.nii"
    nib.save(image(make_head("t2w", seed=1)), plain)
    (root / "in" / "Bob" / "Bob-t2w.nii.gz").unlink()
    write_study(root / "in", "Cem", ("t1n", "t2w"), seed=2)
    nib.save(image(make_head("t2w", shape=(20, 20, 20))), root / "in" / "Cem" / "Cem-t2w.nii.gz")
    model = read_model(save_untrained(root / "model", guidance="last", sources=ALL_FOUR, targets=ALL_FOUR))
    complete_cohort(root / "in", root / "completed", model, InferenceSettings(precision="float32"))
    return root


def test_acquired_and_synthetic_volumes_make_one_dataset(folders, tmp_path):
    out = tmp_path / "Dataset501_Completed"
    record = export_nnunet(folders / "in", folders / "completed", out)
    assert record["synthetic"] == {"Ann": [], "Bob": ["t1c"]}
    assert record["left_out"] == {"Cem": "it lacks t1c, t2f; complete it first, or choose --modalities"}
    two = export_nnunet(folders / "in", folders / "completed", tmp_path / "two", modalities="FLAIR,T1")
    assert two["channels"] == ["t2f", "t1n"]
    assert json.loads((out / "dataset.json").read_text()) == {
        "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
        "labels": {"background": 0, "label 1": 1, "label 2": 2, "label 3": 3},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    names = {str(path.relative_to(out)) for path in out.rglob("*.nii.gz")}
    channels = {
        f"images{part}/{case}_{n:04d}.nii.gz" for part, case in (("Tr", "Ann"), ("Ts", "Bob")) for n in range(4)
    }
    assert names == channels | {"labelsTr/Ann.nii.gz"}
    for number, source in enumerate(
        [
            folders / "in" / "Bob" / "Bob-t1n.nii.gz",
            folders / "completed" / "Bob" / "Bob-t1c_synthetic.nii.gz",
            folders / "in" / "Bob" / "Bob-t2w.nii",
        ]
    ):
        made, given = nib.load(out / "imagesTs" / f"Bob_{number:04d}.nii.gz"), nib.load(source)
        np.testing.assert_array_equal(made.get_fdata(), given.get_fdata())
        np.testing.assert_array_equal(made.affine, given.affine)
        assert made.header["descrip"] == given.header["descrip"]
    labels, first = nib.load(out / "labelsTr" / "Ann.nii.gz"), nib.load(out / "imagesTr" / "Ann_0000.nii.gz")
    assert labels.shape == first.shape == SHAPE
    np.testing.assert_array_equal(labels.affine, first.affine)
    data = np.asarray(labels.dataobj)
    assert set(np.unique(data)) == {0, 1, 3}
    assert (data[12:16, 14:18, 10:13] == 3).all()


def test_chosen_channels_in_their_order(folders, tmp_path):
    record = export_nnunet(folders / "in", folders / "completed", tmp_path / "out", modalities=("t2f", "t1n"))
    assert list(record["synthetic"]) == ["Ann", "Bob"]
    flair = nib.load(tmp_path / "out" / "imagesTs" / "Bob_0000.nii.gz")
    np.testing.assert_array_equal(flair.get_fdata(), nib.load(folders / "in" / "Bob" / "Bob-t2f.nii.gz").get_fdata())


def test_volumes_on_two_grids_are_left_out(folders, tmp_path):
    record = export_nnunet(folders / "in", folders / "completed", tmp_path / "out", modalities=("t1n", "t2w"))
    assert "Cem-t2w.nii.gz is 20×20×20" in record["left_out"]["Cem"]
    assert not list((tmp_path / "out").rglob("Cem*"))


def test_what_cannot_be_exported_is_said(folders, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="is not empty"):
        export_nnunet(folders / "in", folders / "completed", tmp_path)
    with pytest.raises(StudyError, match=r"No case of .* has all of pdw: it lacks pdw"):
        export_nnunet(folders / "in", folders / "completed", tmp_path / "out", modalities=("pdw",))
    (study,) = write_study(tmp_path / "in", "Eve", ("t1n",)).iterdir()
    shutil.copy(study, study.with_name("Eve_T1.nii.gz"))
    with pytest.raises(StudyError, match=r"No case of .*in can be written: Eve: 2 files claim to be t1n"):
        export_nnunet(tmp_path / "in", folders / "completed", tmp_path / "out")


def test_synthetic_volumes_are_never_another_patient_s_and_never_called_acquired(folders, tmp_path):
    write_study(tmp_path / "in", "Bob", ("t1n", "t2w", "t2f"), seed=9)  # another one of this name
    with pytest.raises(StudyError, match=r"Bob was made of other scans of this name \(t1n, t2w, t2f\)"):
        export_nnunet(tmp_path / "in", folders / "completed", tmp_path / "out")
    shutil.rmtree(tmp_path / "in" / "Bob")
    shutil.copytree(folders / "in" / "Bob", tmp_path / "in" / "Bob")
    made = folders / "completed" / "Bob" / "Bob-t1c_synthetic.nii.gz"
    shutil.copy(made, tmp_path / "in" / "Bob" / "Bob-t1c.nii.gz")  # as a challenge's output lies
    for name, completed in (("one", folders / "completed"), ("two", tmp_path / "none")):
        completed.mkdir(exist_ok=True)
        record = export_nnunet(tmp_path / "in", completed, tmp_path / name)
        assert record["synthetic"] == {"Bob": ["t1c"]}
        assert (tmp_path / name / "imagesTs" / "Bob_0001.nii.gz").read_bytes() == made.read_bytes()


def test_labels_of_years_that_have_a_3_stay_as_they_are(folders, tmp_path):
    """4 enhances beside a 3 that does not, or is the cavity of a resection; it becomes 3 where no study has one."""
    studies = {"P1": (3, 4), "P2": (1, 4), "BraTS-GLI-02405-100": (1, 4)}
    for case, (rest, few) in studies.items():
        write_study(tmp_path / "in", case, ALL_FOUR, lesion=True)
        path = tmp_path / "in" / case / f"{case}-seg.nii.gz"
        labels = np.where(np.asarray(nib.load(path).dataobj) > 0, rest, 0).astype(np.uint8)
        labels[5, 5, 5] = few
        nib.save(image(labels), path)
    (tmp_path / "completed").mkdir()

    def exported(name):
        export_nnunet(tmp_path / "in", tmp_path / "completed", tmp_path / name)
        made = {path.name.split(".")[0]: nib.load(path) for path in (tmp_path / name / "labelsTr").iterdir()}
        return {case: tuple(int(value) for value in np.unique(labels.dataobj)[1:]) for case, labels in made.items()}

    assert exported("all") == studies
    shutil.rmtree(tmp_path / "in" / "P1")
    assert exported("without") == {"P2": (1, 3), "BraTS-GLI-02405-100": (1, 4)}
