"""What the studies of a training look like, and studies that look otherwise: on phantoms."""

import numpy as np
import pytest

from crossmr.baselines import fit_baselines
from crossmr.completion.checks import unlike
from crossmr.data.naming import find_studies
from crossmr.data.study import load_study
from crossmr.phantom import write_cohort
from crossmr.typical import PARTS, _shape, describe, deviations, is_typical, summarise

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
FORM = {"shape": (72, 84, 40), "spacing_mm": (2.6, 2.6, 4.0), "skull": False}


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    """Ten brains: modality → volume, the head, and the spacing."""
    folder = tmp_path_factory.mktemp("brains")
    write_cohort(folder, 10, seed=11, **FORM)
    found = []
    for files in find_studies(folder):
        study = load_study(files)
        box = study.box(0)
        volumes = {m: study.normalised(m, box) for m in MODALITIES}
        found.append((volumes, study.mask[box], study.reference.spacing_mm))
    return found


@pytest.fixture(scope="module")
def baselines(brains):
    return fit_baselines([lambda volumes=volumes: volumes for volumes, _, _ in brains[:8]], MODALITIES)


@pytest.fixture(scope="module")
def typical(brains, baselines):
    return summarise((True, describe(*brain, baselines, MODALITIES)) for brain in brains[:8])


@pytest.fixture
def found(brains, baselines, typical):
    """Kinds of what is found in the last brain after a change of its volumes, or of one of them."""

    def look(change=None, modality=None, head=None):
        volumes, mask, spacing = brains[9]
        head = mask if head is None else head
        changed = {m: change(v) if change and modality in (None, m) else v for m, v in volumes.items()}
        changed = {m: np.where(head, v, np.float32(0)).astype(np.float32) for m, v in changed.items()}
        numbers = describe(changed, head, spacing, baselines, MODALITIES)
        return [(one.kind, one.words) for one in unlike(deviations(numbers, typical, without_skull=True))]

    return look


def test_brains_like_those_of_the_training_are_nothing_special(found):
    assert found() == []


def noisy(volume):
    return np.clip(volume + np.random.default_rng(0).normal(0, 0.1, volume.shape), 0.001, 1)


def uneven(volume):
    return np.clip(volume * np.linspace(0.3, 1.7, volume.shape[2]), 0.001, 1)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (noisy, "smooth", "T2 is noisier than the scans"),
        (uneven, "even", "T2 is brighter in one region than in others"),
    ],
)
def test_a_noisy_or_uneven_volume_is_named(found, change, kind, words):
    kinds = dict(found(change, "t2w"))
    assert kinds[kind].startswith(words)
    assert all("T2" in said for said in kinds.values())


def test_a_volume_that_is_upside_down_among_others_is_named(found):
    kinds = dict(found(lambda volume: volume[::-1, ::-1], "t2f"))
    assert kinds["edges"].startswith("FLAIR shows other edges than the other scans")


def test_a_head_that_is_turned_or_cut_has_another_shape(found, brains):
    _, mask, _ = brains[9]
    assert "shape" in dict(found(lambda volume: volume[::-1, ::-1], head=mask[::-1, ::-1]))
    cut = mask.copy()
    cut[:, : mask.shape[1] // 3] = False
    assert "shape" in dict(found(head=cut))


def test_a_head_in_few_slices_has_the_shape_of_its_other_axes(brains):
    _, mask, _ = brains[9]
    thick = mask[:: len(mask) // 5][:5]
    whole, few = _shape(mask), _shape(thick)
    assert set(few) == set(whole) - {f"shape {k}" for k in range(PARTS)}
    assert max(abs(few[name] - whole[name]) for name in few) < 0.1


def test_two_volumes_alone_accuse_each_other():
    (one,) = unlike({"edges t1n t2w": 3.0})
    assert one.words.startswith("T1 and T2 show other edges.")
    assert unlike({"edges t1n t2w": 2.0}) == []
    assert unlike({}) == []


def test_only_groups_and_numbers_that_are_known_are_compared(typical):
    assert is_typical(typical)
    assert deviations({"smooth t1n": 0.1}, typical, without_skull=False) == {}
    assert deviations({"smooth pdw": 0.1}, typical, without_skull=True) == {}
    few = summarise([(True, {"smooth t1n": 0.5})] * 4)
    assert few == {"without_skull": {}}


@pytest.mark.parametrize("record", [3, [], {"with_skull": 3}, {"with_skull": {"a": [1.0]}}, {"a": {"b": [1.0, 0.0]}}])
def test_a_record_of_other_types_is_recognised(record):
    assert not is_typical(record)
    assert is_typical({})
