"""The weights that are shipped: sound, small, described, and good for any subset with no training and no network."""

import json
import socket
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from crossmr.cli import main
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.overlap import find_overlap
from crossmr.networks.model import read_model
from crossmr.phantom import write_cohort
from crossmr.registry import find_model, load_model

CARD = (Path(__file__).parents[1] / "MODEL_CARD.md").read_text()
MODALITIES = ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two phantoms that were not trained on; the second has T2 alone."""
    folder = tmp_path_factory.mktemp("cohort")
    lacking = [m for m in MODALITIES if m != "t2w"]
    write_cohort(folder, 2, seed=99, shape=(72, 84, 32), spacing_mm=(2.6, 2.6, 5.5), missing={1: lacking})
    return folder


def test_they_are_small_and_the_card_says_which_they_are():
    folder = find_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2**20
    model = read_model(folder)
    assert model.config.any_subset
    assert model.config.modalities == MODALITIES
    assert model.record["sha256"][:12] in CARD
    known, *before = model.patients  # the rounds before learnt from nobody else
    assert len(known.salt) == 32
    assert not any(one.train or one.val for one in before)
    assert all(len(name) == 16 for name in (*known.train, *known.val))  # no patient is named
    for word in ("TCGA", "BraTS", "CC BY", "not a medical device", "enhancement"):
        assert word in CARD


def test_a_study_is_completed_with_no_model_named_and_no_network(cohort, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "argv", ["crossmr", "complete", str(cohort / "PHANTOM-00001-000"), "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    (case,) = (path for path in tmp_path.iterdir() if path.name.startswith("PHANTOM"))
    reference = nib.load(cohort / case.name / f"{case.name}-t2w.nii.gz")
    for target in ("t1n", "t1c", "t2f"):
        image = nib.load(case / f"{case.name}-{target}_synthetic.nii.gz")
        assert image.shape == reference.shape
        np.testing.assert_array_equal(image.affine, reference.affine)
        assert image.header["descrip"].item().startswith(b"SYNTHETIC")
        assert image.get_fdata().std() > 0.05
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert read_model(find_model()).record["sha256"] in json.dumps(manifest)


def test_every_subset_is_better_than_the_mean_image_and_near_the_linear_regression(cohort, tmp_path):
    summary = evaluate(find_model(), cohort, tmp_path, EvaluationSettings(every_subset=True))["summary"]
    brain = {(e["sources"], e["target"], e["predictor"]): e["psnr"]["mean"] for e in summary if e["region"] == "brain"}
    pairs = {(sources, target) for sources, target, _ in brain}
    assert len(pairs) == 28
    for sources, target in sorted(pairs):
        own = brain[sources, target, "unguided"]
        assert own > brain[sources, target, "linear regression"] - 2.5
        if target != "t2w":  # the card says so: T2 is its weakest, and all phantoms have one template
            assert own > brain[sources, target, "mean image"] + 1


def test_they_say_of_every_round_of_their_training_on_whom_it_was():
    """So that an evaluation does not say that nobody knows."""
    found = find_overlap(load_model("default"), {"case": "Nobody"}, {"case": ()})
    assert found == {"known": True, "trained_on": [], "validated_on": []}
