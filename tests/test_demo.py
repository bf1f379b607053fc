"""The README's first command: everything it promises is there, on a phantom, offline."""

import json
import socket
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from crossmr import demo as module
from crossmr.demo import demo
from crossmr.errors import OutputError
from crossmr.training.run import train

STEPS = 35


def train_in_steps(prepared, run, settings, **kwargs):
    """As many steps on every machine."""
    assert settings.minutes == 0.15
    return train(prepared, run, replace(settings, minutes=None, steps=STEPS), **kwargs)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A demo of a few steps of training, whatever else the machine does, with the network off."""
    folder = tmp_path_factory.mktemp("demo") / "demo"

    def refuse(*_: object) -> None:
        raise AssertionError("the demo opened a network connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(module, "train", train_in_steps)
        demo(folder, minutes=0.15)
    return folder


@pytest.mark.parametrize("completed", ["completed", "trained"])
def test_the_hole_is_filled_on_the_study_s_own_grid(out, completed):
    (case,) = (path.name for path in (out / "incomplete").iterdir())
    reference = nib.load(out / "incomplete" / case / f"{case}-t1n.nii.gz")
    for target in ("t1c", "t2f"):
        assert not (out / "incomplete" / case / f"{case}-{target}.nii.gz").exists()
        image = nib.load(out / completed / case / f"{case}-{target}_synthetic.nii.gz")
        assert image.shape == reference.shape
        np.testing.assert_array_equal(image.affine, reference.affine)
        data = image.get_fdata()
        assert 0 <= data.min() < data.max() <= 1
        assert data.std() > 0.05
        assert image.header["descrip"].item().startswith(b"SYNTHETIC")


def test_the_shipped_weights_show_the_lesion_in_flair(out):
    """As the sentence above the picture says: oedema is bright and fluid dark, as in truth."""
    (case,) = (path.name for path in (out / "incomplete").iterdir())

    def read(folder: str, name: str) -> np.ndarray:
        return nib.load(out / folder / case / f"{case}-{name}.nii.gz").get_fdata()

    labels, t1, t2 = (read("truth", name) for name in ("seg", "t1n", "t2w"))
    brain = t1 > 0
    fluid = (t2 > np.percentile(t2[brain], 97)) & (labels == 0)
    contrasts = []
    for flair in (read("truth", "t2f"), read("completed", "t2f_synthetic")):
        low, median, high = np.percentile(flair[brain], (25, 50, 75))
        contrasts.append([(flair[where].mean() - median) / (high - low) for where in (labels == 2, fluid)])
    (lesion, dark), (own_lesion, own_dark) = contrasts
    assert own_lesion > 0.5 * lesion > 0.5
    assert own_dark < 0.25 * dark < -0.25


def test_the_evaluation_stands_beside_its_baselines(out):
    summary = json.loads((out / "evaluation" / "metrics.json").read_text())["summary"]
    predictors = {entry["predictor"] for entry in summary}
    assert {"unguided", "constant", "mean image", "linear regression"} == predictors
    brain = {
        (entry["target"], entry["predictor"]): entry["psnr"]["mean"] for entry in summary if entry["region"] == "brain"
    }
    for target in ("t1c", "t2f"):
        assert brain[target, "unguided"] > brain[target, "constant"] + 1


def test_standard_deviations_say_where_it_may_be_wrong(out):
    (case,) = (path.name for path in (out / "incomplete").iterdir())
    for target in ("t1c", "t2f"):
        image, std = (
            nib.load(out / "trained" / case / f"{case}-{target}_{kind}.nii.gz").get_fdata()
            for kind in ("synthetic", "std")
        )
        assert std.shape == image.shape
        assert std[image > 0].max() > 0.01
    uncertainty = json.loads((out / "evaluation" / "metrics.json").read_text())["uncertainty"]
    assert {(e["target"], e["uncertainty"]) for e in uncertainty} == {
        (target, name) for target in ("t1c", "t2f") for name in ("std", "predicted intensity")
    }
    for entry in uncertainty:
        assert entry["error_most_certain_90"] > 0
        if entry["uncertainty"] == "std":
            assert 0.6 < entry["coverage_95"] <= 1  # calibrated, on few patients


@pytest.mark.parametrize("name", ["shipped", "trained"])
def test_the_pictures_show_something(out, name):
    picture = np.asarray(Image.open(out / f"{name}.png"))
    assert picture.shape[1] > picture.shape[0] > 200
    assert picture.std() > 20


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "cohort" / "REAL-001").mkdir(parents=True)  # as the tutorial names the user's own
    for content in ("mine", '{"format": "another"}', None):
        if content is not None:
            (tmp_path / "demo.json").write_text(content)
        with pytest.raises(OutputError, match="is neither empty nor an earlier demo's; name another folder"):
            demo(tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
            {"cohort", "REAL-001"} | {path.name for path in tmp_path.glob("demo.json")}
        )
        (tmp_path / "demo.json").unlink(missing_ok=True)


def test_in_an_earlier_demo_nothing_of_another_s_is_replaced(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr("crossmr.demo.complete_cohort", fail)
    (tmp_path / "demo.json").write_text('{"format": "crossmr-demo"}')
    for name in ("trained.png", "cohort/PHANTOM-00015-000/PHANTOM-00015-000-t1n.nii.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        with pytest.raises(OutputError, match=rf"{path.name} is not crossmr's, so .*Name another folder"):
            demo(tmp_path)
        assert [place for place in tmp_path.rglob("*") if place.is_file()] == [tmp_path / "demo.json", path]
        assert path.read_text() == "mine"
        path.unlink()
