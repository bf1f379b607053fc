"""Bright areas of the acquired scans, and synthetic volumes that have lost them: on phantoms."""

import numpy as np
import pytest
from conftest import save_untrained
from scipy import ndimage

from crossmr.completion.cohort import complete_cohort
from crossmr.completion.lesions import find_lesions, most_uncertain
from crossmr.completion.study import complete
from crossmr.data.naming import find_studies
from crossmr.data.study import load_study
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.phantom import write_cohort

FORM = {"shape": (72, 84, 40), "spacing_mm": (2.6, 2.6, 4.0), "skull": False}
ALL = ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A brain with a lesion."""
    folder = tmp_path_factory.mktemp("lesion")
    write_cohort(folder, 1, seed=3, lesion=True, **FORM)
    return folder


@pytest.fixture(scope="module")
def studies(cohort, tmp_path_factory):
    """One brain with a lesion, and one without."""
    folder = tmp_path_factory.mktemp("healthy")
    write_cohort(folder, 1, seed=3, lesion=False, **FORM)
    return [load_study(find_studies(place)[0]) for place in (cohort, folder)]


def looked_at(study, target, made=None, sources=None):
    """What is found where `target` is synthetic and looks like `made`, by default like the truth."""
    volumes = {m: study.normalised(m) for m in study.volumes}
    volumes["t2w"] += np.float32(0.2) * (study.labels > 0)  # in phantoms lesions are paler than in patients
    made = volumes[target] if made is None else made
    acquired = {m: v for m, v in volumes.items() if m != target and m in (sources or ALL)}
    return find_lesions(acquired, study.mask, study.reference.spacing_mm, {target: made}, stripped=True)


def without_lesion(study, target, share=0.0):
    """The true contrast with so much of its lesion's brightness left."""
    volume, lesion = study.normalised(target), ndimage.binary_dilation(study.labels > 0, iterations=3) & study.mask
    healthy = np.median(volume[study.mask & ~lesion])
    return np.where(lesion, healthy + np.float32(share) * (volume - healthy), volume).astype(np.float32)


@pytest.mark.parametrize("target", ["t2w", "t2f"])
def test_a_lesion_that_is_kept_is_no_finding_but_the_place_to_look_at(studies, target):
    sick, _ = studies
    found, at = looked_at(sick, target)
    assert found == []
    assert sick.labels[at] > 0


@pytest.mark.parametrize("target", ["t2w", "t2f"])
@pytest.mark.parametrize("share", [0.0, 0.15])
def test_a_lesion_that_is_lost_is_found(studies, target, share):
    sick, _ = studies
    (found,), at = looked_at(sick, target, without_lesion(sick, target, share))
    source, name = {"t2w": ("FLAIR", "T2"), "t2f": ("T2", "FLAIR")}[target]
    assert (found.kind, found.severity, found.contrasts) == ("lost lesion", "look", (target,))
    assert found.words.startswith(f"{source} has a bright area of ")
    assert found.words.endswith(f"that the synthetic {name} has lost.")
    assert sick.labels[at] > 0


def test_a_healthy_brain_has_lost_nothing(studies):
    _, healthy = studies
    for target in ("t1n", "t1c", "t2w", "t2f"):
        assert looked_at(healthy, target)[0] == []


def test_enhancement_is_never_vouched_for_where_there_is_a_lesion(studies):
    sick, _ = studies
    (found,), _ = looked_at(sick, "t1c")
    assert (found.kind, found.contrasts) == ("lost enhancement", ("t1c",))
    assert looked_at(sick, "t1n")[0] == []


@pytest.mark.parametrize(("sources", "kinds"), [(("t1n", "t1c"), ["unchecked lesions"]), (("t1n", "t2w"), [])])
def test_without_t2_and_flair_nobody_can_tell(studies, sources, kinds):
    found, at = looked_at(studies[0], "t2f", sources=sources)
    assert [one.kind for one in found] == kinds
    assert (at is None) == bool(kinds)


def test_t2_alone_shows_fluid_as_bright_as_lesions_so_nothing_is_checked(studies):
    (found,), at = looked_at(studies[0], "t2f", sources=("t2w",))
    assert (found.kind, found.severity, found.contrasts, at) == ("unchecked lesions", "look", ("t2f",), None)
    assert found.words.startswith("T2 was acquired without FLAIR, T1 and T1ce, and alone does not tell lesions from")
    assert looked_at(studies[0], "t1n", sources=("t2w",)) == ([], None)


@pytest.mark.parametrize("fluid", ["t1n", "t1c"])
def test_t2_with_t1_or_t1ce_tells_lesions_from_fluid(studies, fluid):
    sick, healthy = studies
    sources, lost = ("t2w", fluid), without_lesion(sick, "t2f")
    found, at = looked_at(sick, "t2f", sources=sources)
    assert (found, sick.labels[at] > 0) == ([], True)
    (found,), at = looked_at(sick, "t2f", lost, sources)
    assert (found.kind, sick.labels[at] > 0) == ("lost lesion", True)
    flat = np.where(healthy.mask, np.float32(1 / 3), np.float32(0))  # in which nothing is as bright as fluid is in T2
    assert looked_at(healthy, "t2f", flat, sources) == ([], None)


def test_what_the_model_does_not_take_shows_lesions_all_the_same(cohort, studies, tmp_path):
    """A model from T1 to T2, and a study with FLAIR."""
    sick, _ = studies
    model = save_untrained(tmp_path / "model", guidance="none", sources=("t1n",), targets=("t2w",))
    paths = find_studies(cohort)[0].images()
    made = complete({m: paths[m] for m in ("t1n", "t2f")}, model, InferenceSettings(precision="float32"))
    assert "unchecked lesions" not in [reason["kind"] for reason in made.manifest["reasons"]]
    x, y, z = np.rint(np.linalg.inv(sick.reference.affine) @ (*made.manifest["look_at"]["mm"], 1))[:3].astype(int)
    assert sick.labels[z, y, x] > 0


def test_the_largest_standard_deviation_is_away_from_the_rim_and_the_ends():
    head = np.zeros((12, 60, 60), bool)
    head[1:11, 5:55, 5:55] = True
    std = np.where(head, 0.1, 0).astype(np.float32)
    std[:, 5:6] = 5
    std[5:8, 28:33, 38:43] = 1
    assert most_uncertain(std, head, (3.0, 2.0, 2.0), stripped=True) == pytest.approx((6, 30, 40), abs=2)
    assert most_uncertain(std, head & False, (3.0, 2.0, 2.0), stripped=True) is None
    std[1, 15:45, 15:45] = 9  # the head's last slice
    assert most_uncertain(std, head, (3.0, 2.0, 2.0), stripped=True) == pytest.approx((6, 30, 40), abs=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_untrained(tmp_path_factory.mktemp("model"), guidance="none", sources=ALL, targets=ALL)
    return read_model(folder)


def test_manifest_and_picture_say_where_the_lesion_is(cohort, studies, model, tmp_path):
    """An untrained network loses any lesion; the place in mm is that of the lesion in the file."""
    sick, _ = studies
    images = {m: sick.volumes[m] for m in ("t1n", "t2f")}
    paths = find_studies(cohort)[0].images()
    made = complete(
        {m: paths[m] for m in images}, model, InferenceSettings(precision="float32"), targets=("t2w", "t1c")
    )
    kinds = {reason["kind"]: reason["contrasts"] for reason in made.manifest["reasons"]}
    assert kinds["lost enhancement"] == ["t1c"]
    assert made.manifest["verdict"] == "look"
    place = made.manifest["look_at"]
    assert place["why"] == "the largest bright area of the acquired scans"
    x, y, z = np.rint(np.linalg.inv(sick.reference.affine) @ (*place["mm"], 1))[:3].astype(int)
    assert sick.labels[z, y, x] > 0
    (tmp_path / "in").mkdir()
    for modality in images:
        (tmp_path / "in" / f"P-{modality}.nii.gz").write_bytes(paths[modality].read_bytes())
    complete_cohort(tmp_path / "in", tmp_path / "out", model, InferenceSettings(precision="float32"))
    assert (tmp_path / "out" / "pictures" / "P.webp").exists()
