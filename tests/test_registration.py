"""Registration: a head that lies elsewhere, on another grid, comes to lie on the first one, or is refused."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import save_untrained
from scipy import ndimage
from scipy.spatial.transform import Rotation

from crossmr.completion.cohort import complete_cohort
from crossmr.data.naming import find_studies
from crossmr.data.registration import register_rigidly
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.errors import ConfigError, StudyError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.phantom import write_cohort

SHIFT_MM = (9.0, -6.0, 12.0)
TURN = nib.eulerangles.euler2mat(0.12, -0.08, 0.10)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A phantom's T1 and T2, and that T2 as another scan: a grid of its own, its head turned and moved."""
    folder = tmp_path_factory.mktemp("head")
    write_cohort(folder, 1, seed=2, shape=(72, 84, 56), spacing_mm=(2.6, 2.6, 3.2))
    (files,) = find_studies(folder)
    paths = files.images()
    there = nib.load(paths["t2w"])
    movement = np.eye(4)
    movement[:3, :3], movement[:3, 3] = TURN, SHIFT_MM
    finer = np.diag([0.8, 0.8, 1.0, 1.0])  # more voxels across
    shape = (90, 105, 56)
    data = ndimage.affine_transform(np.asarray(there.dataobj, np.float32), finer[:3, :3], output_shape=shape, order=1)
    moved = nib.Nifti1Image(data, movement @ there.affine @ finer)
    return read_volume(paths["t1n"]), read_volume(paths["t2w"]), read_volume(moved), moved, paths


def test_a_head_that_was_moved_comes_back(head):
    fixed, true, moving, _, _ = head
    result = register_rigidly("P", "t2w", moving, fixed)
    assert result.volume.data.shape == fixed.data.shape
    np.testing.assert_array_equal(result.volume.affine, fixed.affine)
    inside = true.data > np.percentile(true.data, 60)
    before = np.corrcoef(true.data[inside], fixed.data[inside])[0, 1]
    after = np.corrcoef(true.data[inside], result.volume.data[inside])[0, 1]
    assert after > 0.93 > before
    assert result.mutual_information[1] > 1.5 * result.mutual_information[0]
    turned = Rotation.from_matrix(TURN.T).as_rotvec(degrees=True)  # it was moved back
    np.testing.assert_allclose(result.rotation_degrees, turned, atol=0.5)
    middle = fixed.affine @ [*(np.array(fixed.data.shape[::-1]) - 1) / 2, 1]
    back = middle[:3] - (TURN @ middle[:3] + SHIFT_MM)
    np.testing.assert_allclose(result.translation_mm, back, atol=1.5)
    again = register_rigidly("P", "t2w", moving, fixed)
    np.testing.assert_array_equal(again.volume.data, result.volume.data)  # the same, every time


def test_what_lies_right_is_left_alone(head):
    fixed, true, _, _, _ = head
    result = register_rigidly("P", "t2w", true, fixed)
    assert result.volume is true
    assert result.displacement_mm < 1.5


@pytest.mark.parametrize("cut", [0, 14])
def test_what_lies_right_on_another_grid_is_resampled_where_it_lies(cut, head):
    """Slices twice as thick, of a head whose T1 lacks its top or not."""
    fixed, true, _, _, paths = head
    there = nib.load(paths["t2w"])
    data = np.asarray(there.dataobj, np.float32)
    thick = np.diag([1, 1, 2, 1.0])
    thick[2, 3] = 0.5
    moving = nib.Nifti1Image((data[:, :, ::2] + data[:, :, 1::2]) / 2, there.affine @ thick)
    t1 = nib.load(paths["t1n"])
    short = nib.Nifti1Image(np.asarray(t1.dataobj, np.float32)[:, :, : t1.shape[2] - cut], t1.affine)
    result = register_rigidly("P", "t2w", read_volume(moving), read_volume(short))
    assert result.kept
    assert (result.translation_mm, result.displacement_mm) == ((0, 0, 0), 0)
    assert "left where its header says (mutual information" in str(result)
    assert result.volume.data.shape == (fixed.data.shape[0] - cut, *fixed.data.shape[1:])
    middle = slice(10, 30)
    assert np.corrcoef(result.volume.data[middle].ravel(), true.data[middle].ravel())[0, 1] > 0.95


def test_what_is_no_head_or_far_off_is_refused(head):
    fixed, _, _, moved, _ = head
    noise = nib.Nifti1Image(
        np.random.default_rng(0).normal(100, 10, (40, 40, 40)).astype(np.float32), np.diag([5, 5, 5, 1.0])
    )
    with pytest.raises(StudyError, match=r"P: t2w .* cannot be registered .* Look at both"):
        register_rigidly("P", "t2w", read_volume(noise), fixed)
    far = moved.affine.copy()
    far[:3, 3] += (0, 0, 300)
    with pytest.raises(StudyError, match="cannot be registered"):
        register_rigidly("P", "t2w", read_volume(nib.Nifti1Image(np.asarray(moved.dataobj), far)), fixed)


def test_only_volumes_on_another_grid_are_registered_if_needed(head):
    _, _, _, moved, paths = head
    images = {"t1n": paths["t1n"], "t1c": paths["t2w"], "t2w": moved}
    study = load_study(images, register="if needed")
    assert len(study.notes) == 1
    assert study.notes[0].startswith("t2w was registered to t1n")
    np.testing.assert_array_equal(study.volumes["t1c"].data, read_volume(paths["t2w"]).data)


def test_a_lesion_drawn_on_another_grid_moves_with_its_volume(head, tmp_path):
    """And one that fits no volume leaves the study without labels, and says so."""
    fixed, true, moving, _, _ = head
    (tmp_path / "P").mkdir()
    nib.save(nib.Nifti1Image(*_stored(fixed)), tmp_path / "P" / "P_T1.nii.gz")
    nib.save(nib.Nifti1Image(*_stored(moving)), tmp_path / "P" / "P_T2.nii.gz")
    bright = _stored(moving)[0] > np.percentile(moving.data, 98)  # fluid
    nib.save(nib.Nifti1Image((2 * bright).astype(np.uint8), moving.affine), tmp_path / "P" / "P_lesion.nii.gz")
    (files,) = find_studies(tmp_path)
    with pytest.raises(StudyError, match="pass --register"):
        load_study(files)
    study = load_study(files, register="always")
    assert study.labels is not None
    assert study.label_values == (2,)
    assert study.labels.shape == study.mask.shape
    there = true.data > np.percentile(true.data, 97)
    assert there[study.labels == 2].mean() > 0.85
    assert [note for note in study.notes if "segmentation" in note] == []
    nib.save(nib.Nifti1Image(bright[:, :, 1:].astype(np.uint8), moving.affine), files.labels[0])
    study = load_study(files, register="always")
    assert study.labels is None
    (note,) = [note for note in study.notes if "segmentation" in note]
    assert note.startswith("the segmentation *_lesion.nii.gz is not used: it is 90×105×55 at")


def _stored(volume):
    """A volume's voxels as files of these tests have them, whose axes are those of RAS+, and its affine."""
    return volume.data.T, volume.affine


def test_completing_with_register_says_what_was_done(head, tmp_path):
    _, _, _, moved, paths = head
    folder = tmp_path / "in" / "P"
    folder.mkdir(parents=True)
    nib.save(nib.load(paths["t1n"]), folder / "P-t1n.nii.gz")
    nib.save(moved, folder / "P-t2w.nii.gz")
    with pytest.raises(StudyError, match="Register and resample them to one grid first, or pass --register"):
        load_study(find_studies(folder)[0])
    model = read_model(save_untrained(tmp_path / "model", guidance="none"))
    settings = InferenceSettings(precision="float32", register="always")
    result = complete_cohort(folder, tmp_path / "out", model, settings)
    assert result.completed == {"P": ["t1c", "t2f"]}
    (note,) = [note for note in result.notes["P"] if "registered" in note]
    assert note.startswith("t2w was registered to t1n: moved by (")
    manifest = json.loads((tmp_path / "out" / "P" / "manifest.json").read_text())
    assert manifest["settings"]["register"] == "always"
    synthetic, reference = (
        nib.load(tmp_path / "out" / "P" / "P-t2f_synthetic.nii.gz"),
        nib.load(folder / "P-t1n.nii.gz"),
    )
    assert synthetic.shape == reference.shape
    np.testing.assert_array_equal(synthetic.affine, reference.affine)


def test_without_simpleitk_it_is_named(head, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"pip install 'crossmr\[register\]'"):
        register_rigidly("P", "t2w", head[2], head[0])
