"""One study on the disk: what the command line writes, whole or absent, and nothing of others is replaced."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import image, make_head, save_untrained, tree, write_images

from crossmr.completion import writing
from crossmr.completion.cohort import complete_cohort
from crossmr.completion.study import complete
from crossmr.data.nifti import write_volume
from crossmr.data.volume import read_volume
from crossmr.display import Display
from crossmr.errors import OutputError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.output.viewer import view_case

SETTINGS = InferenceSettings(ddim_steps=3, precision="float32", device="cpu")
FILES = {"Ann/manifest.json", *(f"Ann/Ann-{m}_{what}.nii.gz" for m in ("t1c", "t2f") for what in ("synthetic", "std"))}


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """A model that says how far its images may be off."""
    return read_model(save_untrained(tmp_path_factory.mktemp("sure"), guidance="last", uncertainty=True))


@pytest.fixture(scope="module")
def ann(cohort, sure):
    """One patient of the cohort, completed in Python."""
    return complete(cohort / "Ann", sure, SETTINGS)


def test_saved_is_what_the_command_line_writes(cohort, sure, ann, tmp_path):
    shutil.copytree(cohort / "Ann", tmp_path / "cohort" / "Ann")
    complete_cohort(tmp_path / "cohort", tmp_path / "line", sure, SETTINGS)
    assert ann.save(str(tmp_path / "saved")) == tmp_path / "saved" / "Ann"
    assert set(tree(tmp_path / "saved")) == FILES
    for name in FILES - {"Ann/manifest.json"}:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "line" / name).read_bytes()
        assert read_volume(tmp_path / "saved" / name).synthetic
    line, saved = (json.loads((tmp_path / way / "Ann" / "manifest.json").read_text()) for way in ("line", "saved"))
    for key in ("created", "seconds", "picture"):  # when and where; the picture is of the report
        line.pop(key), saved.pop(key, None)
    assert saved == line
    assert saved["synthetic"]["t2f"]["file"] == "Ann-t2f_synthetic.nii.gz"


def test_the_other_verbs_read_what_was_saved(cohort, sure, ann, tmp_path, capsys):
    ann.save(tmp_path / "out")
    shutil.copytree(cohort / "Ann", tmp_path / "cohort" / "Ann")
    before = tree(tmp_path / "out")
    summary = complete_cohort(tmp_path / "cohort", tmp_path / "out", sure, SETTINGS, display=Display())
    assert summary.skipped == ["Ann"]
    assert "finished before with" not in capsys.readouterr().out  # nothing has changed since
    assert before.items() <= tree(tmp_path / "out").items()
    page, _ = view_case(tmp_path / "out", "Ann", scans=cohort)
    assert page.stat().st_size > 1000


def test_a_finished_study_is_replaced_only_on_request(model, cohort, ann, tmp_path):
    ann.save(tmp_path)
    before = tree(tmp_path)
    one = complete(cohort / "Ann", model, SETTINGS, targets="t2f")  # of a model without standard deviations
    with pytest.raises(OutputError, match=r"Ann holds a finished study\. Name this one with .*overwrite=True"):
        one.save(tmp_path)
    assert tree(tmp_path) == before
    one.save(tmp_path, overwrite=True)
    assert set(tree(tmp_path)) == {"Ann/manifest.json", "Ann/Ann-t2f_synthetic.nii.gz"}
    ann.save(tmp_path, overwrite=True)
    assert tree(tmp_path) == before


def test_saving_twice_changes_no_result(ann, tmp_path):
    before = json.dumps(ann.manifest)
    ann.save(tmp_path / "one")
    ann.save(tmp_path / "two")
    assert json.dumps(ann.manifest) == before
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


THEIRS = {
    "manifest.json": lambda path: path.write_text('{"format": "theirs"}'),
    "Ann-t2f_synthetic.nii.gz": lambda path: write_volume(image(make_head("t2f")), path),  # a scan with our name
    "Ann-t2f_std.nii.gz": lambda path: path.write_text("no image"),
    "Ann-t1c_synthetic.nii.gz": lambda path: path.symlink_to("elsewhere"),
    "Ann-t1c_synthetic_dicom": lambda path: path.mkdir() or (path / "notes.txt").write_text("mine"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_nothing_of_others_is_replaced(ann, tmp_path, name, overwrite):
    if overwrite and name != "manifest.json":
        ann.save(tmp_path)
        (tmp_path / "Ann" / name).unlink(missing_ok=True)
    (tmp_path / "Ann").mkdir(exist_ok=True)
    (tmp_path / "Ann" / "notes.txt").write_text("mine")
    THEIRS[name](tmp_path / "Ann" / name)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=rf"{name} is not crossmr's, so it is not replaced"):
        ann.save(tmp_path, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_what_lies_beside_stays(ann, tmp_path):
    (tmp_path / "Ann").mkdir()
    (tmp_path / "Ann" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        ann.save(tmp_path, overwrite=overwrite)
        assert set(tree(tmp_path)) == {*FILES, "Ann/notes.txt"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [2, 4, 5])
def test_a_study_is_written_whole_or_not_at_all(ann, tmp_path, monkeypatch, error, failing):
    count = 0

    def fail(write):
        def run(*args):
            nonlocal count
            count += 1
            if count == failing:
                raise error
            write(*args)

        return run

    (tmp_path / "Ann").mkdir()
    (tmp_path / "Ann" / "notes.txt").write_text("mine")
    monkeypatch.setattr(writing, "write_volume", fail(writing.write_volume))
    monkeypatch.setattr(writing, "write_json", fail(writing.write_json))
    wanted = (OutputError, "could not be written: No space left") if isinstance(error, OSError) else (type(error), None)
    with pytest.raises(wanted[0], match=wanted[1]):
        ann.save(tmp_path)
    assert set(tree(tmp_path)) == {"Ann/notes.txt"}


@pytest.mark.parametrize("case", ["", "..", "a/b", "/tmp/x", ".hidden"])
def test_a_name_that_is_no_folder_is_refused(model, tmp_path, case):
    heads = {m: image(make_head(m)) for m in ("t1n", "t2w")}
    with pytest.raises(OutputError, match="is not a name for a study's folder"):
        complete(heads, model, SETTINGS, case=case).save(tmp_path / "out")
    assert tree(tmp_path) == {}


def test_a_study_of_which_nothing_was_synthesised_has_its_manifest(model, tmp_path):
    made = complete(write_images(tmp_path / "cohort", "P", ("t1n", "t2f")), model, SETTINGS)
    place = made.save(tmp_path / "out")
    assert [path.name for path in place.iterdir()] == ["manifest.json"]
    assert "t2w is missing" in json.loads((place / "manifest.json").read_text())["not_filled"]["t1c"]


def test_studies_of_arrays_are_saved_under_their_names(model, tmp_path):
    for case in ("one", "two"):
        pairs = {m: (make_head(m, seed=len(case)), np.diag([6.0, 6.0, 7.0, 1.0])) for m in ("t1n", "t2w")}
        complete(pairs, model, SETTINGS, case=case).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    saved = nib.load(tmp_path / "two" / "two-t2f_synthetic.nii.gz")
    np.testing.assert_array_equal(saved.affine, np.diag([6.0, 6.0, 7.0, 1.0]))


def test_an_outdated_volume_of_another_modality_goes_with_its_manifest(tmp_path):
    """Also of one that no study usually has."""
    folder = save_untrained(tmp_path / "swi", guidance="none", targets=("swi", "t2f"))
    heads = {m: image(make_head(m)) for m in ("t1n", "t2w")}
    complete(heads, folder, SETTINGS).save(tmp_path / "out")
    assert (tmp_path / "out" / "study" / "study-swi_synthetic.nii.gz").exists()
    complete(heads, folder, SETTINGS, targets="t2f").save(tmp_path / "out", overwrite=True)
    assert set(tree(tmp_path / "out")) == {"study/manifest.json", "study/study-t2f_synthetic.nii.gz"}
