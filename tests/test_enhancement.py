"""Which of two T1 is enhanced: a phantom with vessels in either order, and what must not be taken for such a pair."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import image
from scipy import ndimage

from crossmr.data import enhancement
from crossmr.data.enhancement import compare, compare_within, doubtful_files, tell_apart
from crossmr.data.naming import find_studies
from crossmr.data.nifti import write_volume
from crossmr.data.study import load_study
from crossmr.data.volume import on_grid, read_volume
from crossmr.phantom import write_cohort

SPACING = (5.0, 2.6, 2.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A phantom, with skull."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 1, seed=3, shape=(72, 84, 32), spacing_mm=(2.6, 2.6, 5.0))
    return folder


@pytest.fixture(scope="module")
def volumes(folder):
    """Modality → volume."""
    (files,) = find_studies(folder)
    return {m: read_volume(path) for m, path in files.images().items()}


def changed(volume, change):
    return replace(volume, data=np.ascontiguousarray(change(volume.data), np.float32))


def noisy(data):
    return data + np.random.default_rng(0).normal(0, 0.04 * np.median(data[data > data.mean()]), data.shape)


CHANGES = {
    "nothing": lambda data: data,
    "noise": noisy,
    "bias": lambda data: data * np.linspace(0.8, 1.2, data.shape[2]),
    "blur": lambda data: ndimage.gaussian_filter(data, (0, 0.5, 0.5)),
    "moved": lambda data: np.roll(data, 1, 1),
    "other units": lambda data: (data - data.mean()) / data.std(),
    "another grey scale": lambda data: (data / data.mean()) ** 1.4,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_enhanced_one_is_found_in_either_order(change, volumes):
    plain, bright = volumes["t1n"], changed(volumes["t1c"], CHANGES[change])
    assert compare(plain, bright).enhanced == "second"
    assert compare(bright, plain).enhanced == "first"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("modality", ["t1n", "t1c"])
def test_the_same_volume_twice_is_no_pair(modality, change, volumes):
    assert compare(volumes[modality], changed(volumes[modality], CHANGES[change])).enhanced == "neither"


@pytest.mark.parametrize("other", ["t2w", "t2f"])
@pytest.mark.parametrize("modality", ["t1n", "t1c"])
def test_another_contrast_is_no_pair(modality, other, volumes):
    assert compare(volumes[modality], volumes[other]).enhanced == "neither"
    assert compare(volumes[other], volumes[modality]).enhanced == "neither"


def test_volumes_on_other_grids_are_compared_where_they_lie(volumes):
    """Thick sagittal slices of the enhanced one, its axes another way round, and half of the slices of the other."""
    data, affine = volumes["t1c"].data.transpose(2, 1, 0), volumes["t1c"].affine
    thick = data[: len(data) // 2 * 2].reshape(len(data) // 2, 2, *data.shape[1:]).mean(1)
    wide = affine.copy()
    wide[:3, 3] += affine[:3, 0] / 2
    wide[:3, 0] *= 2
    sagittal = read_volume(
        (thick[::-1], wide @ np.diag([-1, 1, 1, 1]) + np.outer(wide[:, 0] * (len(thick) - 1), [0, 0, 0, 1]))
    )
    upper = volumes["t1n"].data.transpose(2, 1, 0)[..., 12:]
    cut = affine.copy()
    cut[:3, 3] += 12 * affine[:3, 2]
    part = read_volume((upper, cut))
    assert compare(part, sagittal).enhanced == "second"
    assert compare(sagittal, part).enhanced == "first"


def test_stripped_brains_and_brains_too_small(volumes):
    study = load_study({m: (v.data.T, v.affine) for m, v in volumes.items()})
    brain = enhancement.within_skull(volumes["t1n"].data, volumes["t1c"].data, study.mask, SPACING)
    assert 300_000 < brain.sum() * np.prod(SPACING) < 1_400_000
    t1n, t1c = volumes["t1n"].data, volumes["t1c"].data
    assert compare_within(t1n, t1c, brain, SPACING, True).enhanced == "second"
    assert compare_within(t1n, t1c, brain & False, SPACING, True) == enhancement.UNKNOWN
    brain[: int(np.flatnonzero(brain.any((1, 2)))[-1])] = False  # one slice is left
    assert compare_within(t1n, t1c, brain, SPACING, True) == enhancement.UNKNOWN


def study_of(folder, tmp_path, **names):
    """Files of these names with the volumes of the phantom."""
    (tmp_path / "P1").mkdir()
    images = find_studies(folder)[0].images()
    for name, modality in names.items():
        volume = read_volume(images[modality])
        write_volume(on_grid(volume.data, volume, description="acquired"), tmp_path / "P1" / f"P1_{name}.nii.gz")
    (files,) = find_studies(tmp_path)
    return files


@pytest.mark.parametrize(
    ("names", "t1n", "t1c"),
    [
        ({"T1_1": "t1n", "T1_2": "t1c"}, "T1_1", "T1_2"),
        ({"T1_1": "t1c", "T1_2": "t1n"}, "T1_2", "T1_1"),
        ({"T1": "t1n", "T1_AX": "t1c"}, "T1", "T1_AX"),
        ({"T1": "t1c", "T1_AX": "t1n"}, "T1_AX", "T1"),
        ({"T1_a": "t1n", "T1_b": "t1c"}, "T1_a", "T1_b"),
        ({"T1_SE": "t1n", "T1_MPRAGE": "t1c", "T1_TSE": "t2w"}, "T1_SE", "T1_MPRAGE"),
    ],
)
def test_files_that_no_word_tells_apart(names, t1n, t1c, folder, tmp_path):
    told = tell_apart(study_of(folder, tmp_path, **names))
    assert {m: path.name for m, path in told.images().items()} == {"t1n": f"P1_{t1n}.nii.gz", "t1c": f"P1_{t1c}.nii.gz"}
    (note,) = told.notes
    assert note.startswith(f"P1_{t1c}.nii.gz was taken for T1ce: vessels brighter than in P1_{t1n}.nii.gz")
    assert note in load_study(told).notes or len(names) == 3
    assert len({*told.passed_over} & {*told.images().values()}) == 0


@pytest.mark.parametrize(
    "names",
    [
        {"T1_1": "t1n", "T1_2": "t1n"},
        {"T1_1": "t1n", "T1_2": "t2w"},
        {"T1_1": "t1n", "T1_2": "t1c", "T1_3": "t1c"},
        {"T1": "t1n", "T1_bet": "t1c"},
        {"T1": "t1n", "T1_AX": "t1c", "T1ce": "t1c"},
    ],
)
def test_what_stays_as_the_names_say(names, folder, tmp_path):
    files = study_of(folder, tmp_path, **names)
    assert tell_apart(files) == files


def test_nothing_is_read_where_names_tell_and_what_cannot_be_read_tells_nothing(folder, tmp_path):
    (files,) = find_studies(folder)
    assert doubtful_files(files) == []
    files = study_of(folder, tmp_path, T1_1="t1n", T1_2="t1c")
    assert [path.name for path in doubtful_files(files)] == ["P1_T1_1.nii.gz", "P1_T1_2.nii.gz"]
    (tmp_path / "P1" / "P1_T1_2.nii.gz").write_bytes(b"\0" * 400)
    assert tell_apart(files) == files


def test_a_head_that_is_empty_or_flat_is_no_pair():
    empty, flat = (read_volume(image(np.full((40, 40, 20), value, np.float32))) for value in (0, 1))
    assert compare(empty, flat).enhanced == "neither"
    head = np.ones((20, 40, 40), bool)
    for values in (np.zeros(head.shape), np.ones(head.shape), np.indices(head.shape)[0] > 18):
        for stripped in (False, True):
            volume = values.astype(np.float32)
            assert compare_within(volume, volume, head, (5, 5, 5), stripped).enhanced == "neither"


def test_nan_outside_the_head_says_nothing(volumes):
    holes = volumes["t1c"].data.copy()
    holes[:, :, :3] = np.nan
    assert compare(volumes["t1n"], changed(volumes["t1c"], lambda _: holes)).enhanced == "second"
