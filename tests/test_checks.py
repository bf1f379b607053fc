"""The checks of a study's input: each finds what it is made for, and keeps quiet about sound studies."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image, make_head

from crossmr.baselines import fit_baselines
from crossmr.completion import checks
from crossmr.data.enhancement import within_skull
from crossmr.data.naming import find_studies
from crossmr.data.study import load_study
from crossmr.phantom import write_cohort

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
BRATS = Path(__file__).parents[2] / "shared" / "data" / "brats" / "BraTS-GLI-00000-000"


def words(findings):
    """What is said of them."""
    return [one.words for one in findings]


def shifts(images, spacing_mm):
    voxels, sides = checks.thinning(spacing_mm)
    return checks.shifts({m: image[voxels] for m, image in images.items()}, sides)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Four phantoms in float."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 4, seed=3, shape=(72, 84, 32), spacing_mm=(2.6, 2.6, 5.0))
    return [load_study(files) for files in find_studies(folder)]


@pytest.fixture(scope="module")
def baselines(studies):
    """The linear regressions of the first three."""

    def reader(study):
        return lambda: {m: study.normalised(m) for m in study.volumes}

    return fit_baselines([reader(study) for study in studies[:3]], MODALITIES)


@pytest.fixture
def volumes(studies):
    """The fourth, normalised; its head; its spacing."""
    study = studies[3]
    return {m: study.normalised(m) for m in study.volumes}, study.mask, study.reference.spacing_mm


def test_of_a_sound_study_nothing_is_said(studies, baselines):
    for study in studies:
        assert checks.check(study, baselines, MODALITIES) == []


@pytest.mark.parametrize(("axis", "voxels", "mm"), [(1, 3, 8), (2, -2, 5), (0, 2, 10)])
def test_a_volume_that_is_moved_is_named_with_its_distance(volumes, axis, voxels, mm):
    images, _, spacing = volumes
    images["t2w"] = np.roll(images["t2w"], voxels, axis)
    (found,) = shifts(images, spacing)
    assert found.words == f"T2 seems to lie {mm} mm away from T1: they may not be registered."
    assert (found.kind, found.severity) == ("not registered", "refuse")


def test_a_volume_that_is_moved_a_little_is_to_be_looked_at(volumes):
    images, _, _ = volumes
    images["t2w"] = np.roll(images["t2w"], 2, 1)
    (found,) = shifts(images, (1.7, 1.7, 2.0))
    assert found.words.startswith("T2 seems to lie 3 mm away from T1")
    assert found.severity == "look"


@pytest.mark.parametrize("pair", [("t1n", "t2w"), ("t1c", "t2f"), ("t2w", "t2f")])
def test_exchanged_names_are_found_out(volumes, baselines, pair):
    images, head, _ = volumes
    assert checks.swaps(images, head, baselines, MODALITIES) == []
    a, b = pair
    images[a], images[b] = images[b], images[a]
    (found,) = checks.swaps(images, head, baselines, MODALITIES)
    names = {"t1n": "T1", "t1c": "T1ce", "t2w": "T2", "t2f": "FLAIR"}
    assert found.words.startswith(f"{names[a]} and {names[b]} may be swapped")
    assert found.severity == "refuse"


def test_names_are_not_judged_without_enough_to_go_by(volumes, baselines):
    images, head, _ = volumes
    exchanged = {"t1n": images["t2f"], "t2f": images["t1n"]}
    assert checks.swaps(exchanged, head, baselines, MODALITIES) == []
    exchanged |= {"t1c": images["t1c"]}
    assert checks.swaps(exchanged, head, {}, MODALITIES) == []
    assert len(checks.swaps(exchanged, head, baselines, MODALITIES)) == 1
    apart = {**baselines, "present": torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])}  # never all of them in one patient
    assert checks.swaps(exchanged, head, apart, MODALITIES) == []


@pytest.mark.parametrize("other", ["t1n", "t1c", "t2f"])
def test_of_two_scans_t2_is_told_from_the_other(volumes, baselines, other):
    images, head, _ = volumes
    pair = {other: images[other], "t2w": images["t2w"]}
    assert checks.swaps(pair, head, baselines, MODALITIES) == []
    (found,) = checks.swaps({other: images["t2w"], "t2w": images[other]}, head, baselines, MODALITIES)
    assert "T2" in found.words
    assert found.severity == "refuse"


@pytest.mark.parametrize(("surely", "severity"), [(1.0, "refuse"), (0.0, "look")])
def test_without_t2_exchanged_names_may_be_doubtful(volumes, baselines, surely, severity, monkeypatch):
    images, head, _ = volumes
    monkeypatch.setattr(checks, "SURELY_SWAPPED", surely)
    three = {"t1n": images["t2f"], "t1c": images["t1c"], "t2f": images["t1n"]}
    assert [one.severity for one in checks.swaps(three, head, baselines, MODALITIES)] == [severity]


@pytest.mark.parametrize(("smooth", "severity"), [(0.0, "refuse"), (9.0, "look")])
def test_exchanged_names_are_only_to_be_looked_at_where_the_images_are_unlike_the_training_s(
    studies, baselines, smooth, severity
):
    study = studies[3]
    volumes, normalisation = dict(study.volumes), dict(study.normalisation)
    for known in (volumes, normalisation):
        known["t1n"], known["t2w"] = known["t2w"], known["t1n"]
    exchanged = replace(study, volumes=volumes, normalisation=normalisation)
    typical = {"with_skull": {"smooth t1n": [smooth, 0.1]}, "without_skull": {}}
    found = checks.check(exchanged, baselines, MODALITIES, {"typical": typical})
    assert {one.severity for one in found if one.kind == "swapped"} == {severity}


def test_one_image_under_two_names(volumes):
    images, head, _ = volumes
    assert checks.same_images(images, head) == []
    images["t1c"] = 0.9 * images["t1n"] + np.float32(0.01)
    (found,) = checks.same_images(images, head)
    assert found.words.startswith("T1 and T1ce are the same image")
    assert found.severity == "refuse"


def test_slices_that_are_not_there(volumes):
    images, head, _ = volumes
    images["t2f"][8:11] = 0
    useful = int((head.sum((1, 2)) >= 0.1 * head.sum((1, 2)).max()).sum())
    (found,) = checks.missing_slices("t2f", images["t2f"], head)
    assert (found.severity, found.words) == ("look", f"FLAIR is empty in 3 of the head's {useful} slices.")
    assert checks.missing_slices("t1n", images["t1n"], head) == []


def test_a_skull_that_the_model_has_not_seen():
    brains, heads, both = ({"studies": 9, "without_skull": n} for n in (9, 0, 4))
    assert "trained on whole heads alone" in checks.skull(heads, stripped=True)[0].words
    assert "trained on stripped brains alone" in checks.skull(brains, stripped=False)[0].words
    for seen, stripped in ((brains, True), (heads, False), (both, True), (both, False), ({}, True)):
        assert checks.skull(seen, stripped=stripped) == []


def test_few_grey_values_and_those_cut_off():
    values = np.random.default_rng(0).gamma(4, 100, 20_000).astype(np.float32)
    assert checks.grey_values("t1n", values) == []
    (few,) = checks.grey_values("t1n", np.rint(values / values.max() * 255))
    assert few.words == "T1 has eight bits, or as few grey values: fine differences are lost."
    assert few.severity == "note"
    limit = float(np.percentile(values, 95))
    (cut,) = checks.grey_values("t1n", np.minimum(values, limit))
    assert (cut.severity, cut.words) == ("look", "T1 is cut off: 5% of the head have the same, brightest value.")


def test_vessels_that_are_brighter_in_t1_than_in_t1ce(studies):
    """With skull and without, where names are exchanged; nothing is said where they are right, or both are one."""
    for study, stripped in itertools.product(studies, (False, True)):
        t1n, t1c = (study.volumes[m].data for m in ("t1n", "t1c"))
        spacing = study.reference.spacing_mm
        head = within_skull(t1n, t1c, study.mask, spacing) if stripped else study.mask
        assert checks.unenhanced(t1n, t1c, head, spacing, stripped) == []
        assert checks.unenhanced(t1n, t1n, head, spacing, stripped) == []
        (said,) = checks.unenhanced(t1c, t1n, head, spacing, stripped)
        assert said.words.startswith("T1 shows vessels that T1ce does not")
        assert checks.unenhanced(t1c, t1n, head & False, spacing, stripped) == []


def test_a_study_whose_t1_and_t1ce_are_swapped_is_warned_of(studies):
    volumes = studies[0].volumes
    swapped = replace(studies[0], volumes={"t1n": volumes["t1c"], "t1c": volumes["t1n"]})
    assert [said.words.split(":")[0] for said in checks.check(swapped, {}, MODALITIES)] == [
        "T1 shows vessels that T1ce does not"
    ]


def test_a_study_s_warnings_come_in_order(tmp_path):
    """Read from files: eight bits, a volume moved by two voxels of 6 mm."""
    moved = np.roll(make_head("t2w", air=False), 2, axis=0)
    given = {"t1n": image(make_head("t1n", air=False)), "t2w": image(np.rint(moved))}
    said = words(checks.check(load_study(given, "P"), {}, MODALITIES))
    assert [note.split()[0] for note in said] == ["T2", "T2"]
    assert "eight bits" in said[0]
    assert "12 mm away from T1" in said[1]


@pytest.mark.skipif(not BRATS.is_dir(), reason=f"needs the real scans in {BRATS}")
def test_a_real_study_is_quiet_until_a_volume_is_moved():
    (files,) = find_studies(BRATS)
    study = load_study(files)
    assert checks.check(study, {}, MODALITIES) == []
    box = study.box(0)
    images = {m: study.normalised(m)[box] for m in study.volumes}
    images["t1c"] = np.roll(images["t1c"], 6, 1)
    assert words(shifts(images, study.reference.spacing_mm)) == [
        "T1ce seems to lie 6 mm away from T1: they may not be registered."
    ]
