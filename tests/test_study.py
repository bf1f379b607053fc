"""One patient's study: refused in one line, or on one grid with a head mask and intensities in [0, 1]."""

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, ellipsoid, image, make_head, write_study
from nibabel.orientations import inv_ornt_aff
from scipy import ndimage

from crossmr.data.naming import find_studies
from crossmr.data.study import (
    Normalisation,
    Study,
    bounding_box,
    fill_slices,
    fit_normalisation,
    foreground,
    largest_component,
    load_study,
    otsu_threshold,
)
from crossmr.errors import CrossmrError, NamingError, StudyError, VolumeError

SCANS = Path(__file__).parents[2] / "shared" / "data"
HEAD = ellipsoid().T
AFFINE = np.diag([6.0, 6.0, 7.0, 1.0])
ROTATED = [
    np.stack([axes, signs], axis=1)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


def load(**volumes: np.ndarray) -> Study:
    """A study of arrays (X, Y, Z)."""
    return load_study({modality: image(data) for modality, data in volumes.items()}, "P1")


def from_folder(folder: Path) -> Study:
    (files,) = find_studies(folder)
    return load_study(files)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Dice."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def z_scored(data: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 within the brain, exactly 0 outside: as many public sets are stored."""
    brain = data != 0
    return np.where(brain, (data - data[brain].mean()) / data[brain].std(), 0).astype(np.float32)


# ---------------------------------------------------------------------------------------------- loading


def test_a_folder_becomes_a_study(tmp_path):
    write_study(tmp_path, "BraTS-GLI-00007-001", lesion=True)
    study = from_folder(tmp_path)
    assert (study.case, study.patient) == ("BraTS-GLI-00007-001", "BraTS-GLI-00007")
    assert list(study.volumes) == list(study.normalisation) == ["t1n", "t1c", "t2f"]
    assert study.reference is study.volumes["t1n"]
    assert study.reference.spacing_mm == (7, 6, 6)
    for modality, volume in study.volumes.items():
        np.testing.assert_array_equal(volume.data, make_head(modality).T)
    assert study.labels is not None
    assert study.labels.dtype == np.uint8
    assert np.argwhere(study.labels == 3).min(0).tolist() == [10, 14, 12]
    assert (study.labels > 0).sum() == 4 * 4 * 3
    assert study.notes == ()


def test_a_folder_without_a_segmentation_has_no_labels(tmp_path):
    assert from_folder(write_study(tmp_path, "P1")).labels is None


def test_images_come_in_any_order_and_the_first_modality_is_the_reference():
    study = load(t2f=make_head("t2f"), swi=make_head("t2w"), t1n=make_head("t1n"))
    assert list(study.volumes) == ["t1n", "t2f", "swi"]
    assert study.reference is study.volumes["t1n"]
    assert (study.case, study.patient) == ("P1", "P1")


def test_allow_limits_what_is_read(tmp_path):
    write_study(tmp_path, "P1", ("t1n", "t2f"))
    (tmp_path / "P1" / "P1-t1c.nii.gz").write_bytes(b"not read")
    (files,) = find_studies(tmp_path)
    assert list(load_study(files, allow=("t2f", "t1n", "t2w")).volumes) == ["t1n", "t2f"]
    with pytest.raises(StudyError, match="no acquired volume"):
        load_study(files, allow=("t2w",))


def test_grids_that_differ_by_rounding_are_one_grid():
    nudged = AFFINE.copy()
    nudged[:3, 3] += 5e-4
    study = load_study({"t1n": image(make_head()), "t2f": image(make_head("t2f"), nudged)})
    assert list(study.volumes) == ["t1n", "t2f"]


# ------------------------------------------------------------------------------------------ orientation


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
def test_storage_order_does_not_matter(oblique):
    affine = AFFINE.copy()
    if oblique:
        angle = np.deg2rad(17)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = turn @ affine
    heads = {m: make_head(m) for m in ("t1n", "t2f")}
    wanted = load_study({m: image(data, affine) for m, data in heads.items()})
    for first, second in zip(ROTATED, ROTATED[17:] + ROTATED[:17], strict=True):  # another storage for each
        stored = {
            modality: image(
                nib.orientations.apply_orientation(data, orientation),
                affine @ inv_ornt_aff(orientation, SHAPE),
            )
            for (modality, data), orientation in zip(heads.items(), (first, second), strict=True)
        }
        study = load_study(stored)
        np.testing.assert_array_equal(study.mask, wanted.mask)
        for modality in heads:
            np.testing.assert_array_equal(study.normalised(modality), wanted.normalised(modality))


# ---------------------------------------------------------------------------------------- normalisation


def test_normalised_magnitude_images_are_in_0_to_1_with_air_at_0():
    study = load(t1n=make_head(), t2f=make_head("t2f"))
    assert not study.masked_background
    for modality in study.volumes:
        normalised = study.normalised(modality)
        assert normalised.dtype == np.float32
        assert 0 == normalised.min() < normalised.max() <= 1
        assert np.median(normalised[study.mask]) == pytest.approx(0.25, abs=1e-6)
        assert np.median(normalised[~HEAD]) < 1e-3
        assert np.quantile(normalised[~HEAD], 0.99) < 0.06  # noise of 2 in a range of some 130


def test_a_bright_scalp_does_not_move_the_brain():
    head = make_head()
    bright = np.where(HEAD.T & ~ndimage.binary_erosion(HEAD.T), 5 * head, head)
    a, b = (fit_normalisation(data.T, HEAD) for data in (head, bright))
    assert b.high - b.low < 1.3 * (a.high - a.low)
    assert np.percentile(bright.T[HEAD], 99.9) > 3 * np.percentile(head.T[HEAD], 99.9)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e5])
@pytest.mark.parametrize("air", [True, False])
def test_the_unit_of_the_intensities_does_not_matter(scale, air):
    plain, scaled = load(t1n=make_head(air=air)), load(t1n=make_head(air=air) * np.float32(scale))
    np.testing.assert_array_equal(plain.mask, scaled.mask)
    np.testing.assert_allclose(plain.normalised("t1n"), scaled.normalised("t1n"), atol=2e-6)


@pytest.mark.parametrize("offset", [-1024, 500])
def test_an_offset_does_not_matter(offset):
    plain, shifted = load(t1n=make_head()), load(t1n=make_head() + np.float32(offset))
    assert overlap(plain.mask, shifted.mask) > 0.999
    assert shifted.normalisation["t1n"].low == pytest.approx(plain.normalisation["t1n"].low + offset, abs=0.01)
    np.testing.assert_allclose(plain.normalised("t1n"), shifted.normalised("t1n"), atol=1e-4)


def test_a_masked_background_that_is_not_0_becomes_0():
    stripped = make_head(air=False)
    study = load(t1n=np.where(stripped == 0, np.float32(-1000), stripped))
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)
    assert (study.normalised("t1n")[~HEAD] == 0).all()


def test_z_scores_have_a_background_of_0():
    study = load(t1n=z_scored(make_head(air=False)), t2f=z_scored(make_head("t2f", air=False)))
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)
    for modality in study.volumes:
        normalised, low = study.normalised(modality), study.normalisation[modality].low
        assert low < -1
        assert (normalised[~HEAD] == 0).all()
        assert 0 == normalised.min() < normalised.max() <= 1
        assert (normalised[HEAD] == 0).mean() < 0.01  # the dark half of the brain is not cut off
        assert np.median(normalised[HEAD]) == pytest.approx(0.25, abs=1e-6)


def test_normalisation_inverts():
    rng = np.random.default_rng(0)
    for scale, offset in [(1, 0), (3000, -1000), (1e-4, 5e-4), (2.5, 0.1)]:
        inside = (rng.random((8, 9, 10)) * scale + offset).astype(np.float32)
        normalisation = Normalisation(low=float(inside.min()), high=float(inside.max()))
        back = normalisation.invert(normalisation.apply(inside))
        assert np.abs(back - inside).max() <= 1e-5 * scale
        np.testing.assert_allclose(normalisation.apply(normalisation.invert(inside[0] * 0 + 0.25)), 0.25, atol=1e-5)


def test_only_what_saturates_is_lost():
    study = load(t1n=make_head(), t2f=make_head("t2f"))
    for modality, volume in study.volumes.items():
        normalisation, normalised = study.normalisation[modality], study.normalised(modality)
        kept = (volume.data > normalisation.low) & (volume.data < normalisation.high)
        assert kept[study.mask].mean() > 0.99
        back = normalisation.invert(normalised)
        assert np.abs(back - volume.data)[kept].max() <= 1e-5 * (normalisation.high - normalisation.low)
        np.testing.assert_array_equal(np.clip(normalisation.scale(volume.data), 0, 1), normalised)


def test_a_single_hot_voxel_does_not_set_the_scale():
    plain, hot = make_head(), make_head()
    hot[14, 16, 12] = 1e5
    a, b = (fit_normalisation(data.T, HEAD) for data in (plain, hot))
    assert b.high - b.low < 1.1 * (a.high - a.low)


def test_a_normalisation_of_two_values_is_finite():
    data = np.where(HEAD, np.float32(7), np.float32(2))
    normalisation = fit_normalisation(data, HEAD)
    np.testing.assert_allclose(normalisation.apply(data), 0.25 * HEAD, atol=1e-6)
    flat = fit_normalisation(np.full_like(data, 7), HEAD)
    assert flat.high > flat.low


# ------------------------------------------------------------------------------------------------- mask


def test_the_mask_of_a_stripped_brain_is_exact():
    study = load(t1n=make_head(air=False), t1c=make_head("t1c", air=False))
    assert study.masked_background
    np.testing.assert_array_equal(study.mask, HEAD)


def test_the_mask_in_noisy_air():
    mask, exact = foreground(make_head().T)
    assert not exact
    assert overlap(mask, HEAD) > 0.95


def test_one_noisy_volume_makes_the_background_noisy():
    assert not load(t1n=make_head(air=False), t2f=make_head("t2f")).masked_background


def test_the_mask_is_the_union_of_the_volumes():
    left, right = make_head(air=False), make_head("t2f", air=False)
    left[:10], right[18:] = 0, 0
    np.testing.assert_array_equal(load(t1n=left, t2f=right).mask, HEAD)


def rotated_scan() -> tuple[np.ndarray, np.ndarray]:
    """A scan turned by 45° into a larger grid, whose corners are thus exactly 0; and where its air is."""
    shape = (44, 44, 28)
    x, y, z = (np.abs(a - (n - 1) / 2) for a, n in zip(np.ogrid[:44, :44, :28], shape, strict=True))
    scanned = (x + y < 24) & (z < 13)
    data = np.where(scanned, make_head(shape=shape), 0).astype(np.float32)
    return data, scanned & ~ellipsoid(shape)


def test_noisy_air_within_exactly_zero_corners_is_no_head():
    data, air = rotated_scan()
    different = data != 0
    assert (air & different).sum() > 0.5 * different.sum()  # a mask of all that is not 0 would be mostly air
    assert data[0, 0, 0] == data[-1, -1, -1] == 0
    study = load(t1n=data)
    assert not study.masked_background
    assert overlap(study.mask, ellipsoid(data.shape).T) > 0.95
    assert study.mask[air.T].mean() < 0.03
    assert np.quantile(study.normalised("t1n")[air.T], 0.99) < 0.06


@pytest.mark.parametrize("air", [True, False])
def test_holes_are_filled(air):
    data = make_head(air=air)
    hole = np.s_[11:16, 13:18, 9:15]
    data[hole] = 0 if not air else data[:5, :5, :6]
    study = load(t1n=data)
    assert study.mask.T[hole].all()
    assert overlap(study.mask, HEAD) > 0.95


@pytest.mark.parametrize("air", [True, False])
def test_only_the_largest_part_is_head(air):
    data = make_head(air=air, shape=(44, 32, 24))
    marker = np.s_[2:7, 13:18, 9:14]
    data[marker] = 120
    study = load(t1n=data)
    assert not study.mask.T[marker].any()
    assert overlap(study.mask, ellipsoid(data.shape).T) > 0.95


def test_largest_component_and_fill_slices():
    mask = np.zeros((3, 9, 9), bool)
    assert not largest_component(mask).any()
    mask[1, 1:6, 1:6] = True
    mask[1, 3, 3] = False
    mask[1, 8, 8] = True
    wanted = np.zeros_like(mask)
    wanted[1, 1:6, 1:6] = True
    np.testing.assert_array_equal(fill_slices(largest_component(mask)), wanted)


def test_the_box_is_tight_and_stays_inside():
    mask = np.zeros((10, 20, 30), bool)
    mask[2:5, 7:9, 29] = True
    assert bounding_box(mask, 0) == np.s_[2:5, 7:9, 29:30]
    assert bounding_box(mask, 4) == np.s_[0:9, 3:13, 25:30]
    study = load(t1n=make_head(air=False))
    assert study.mask[study.box(0)].sum() == study.mask.sum()
    assert all(study.mask[study.box(0)].any(axis=(a, b))[[0, -1]].all() for a, b in [(0, 1), (0, 2), (1, 2)])


def test_otsu_lies_between_air_and_tissue():
    rng = np.random.default_rng(0)
    parts = rng.normal(5, 2, 7000), rng.normal(100, 10, 3000), rng.uniform(0, 100, 500)
    data = np.concatenate(parts).astype(np.float32)
    assert 15 < otsu_threshold(data) < 40
    assert otsu_threshold(data + 1000) == pytest.approx(otsu_threshold(data) + 1000, abs=1)


def test_otsu_of_a_nearly_empty_volume_is_above_its_background():
    data = np.zeros((10, 10, 10), np.float32)
    data[5, 5, 5:8] = (1, 2, 3)
    assert 0 < otsu_threshold(data) < 3


# --------------------------------------------------------------------------------------------- refusals


def with_value(value: float) -> np.ndarray:
    data = make_head("t2f")
    data[3, 4, 5] = value
    return data


def speck() -> np.ndarray:
    data = np.zeros(SHAPE, np.float32)
    data[12:15, 12:15, 12:15] = np.random.default_rng(0).uniform(50, 100, (3, 3, 3))
    return data


TWO_VOLUMES = np.stack([make_head("t2f")] * 2, axis=-1)
DISPLACED = AFFINE + np.array([[0, 0, 0, 0], [0, 0, 0, 2.5], [0, 0, 0, 0], [0, 0, 0, 0]])
REFUSED: dict[str, tuple[Any, type[CrossmrError], list[str]]] = {
    "nan": (with_value(np.nan), StudyError, ["1 voxels", "NaN", "Repair"]),
    "infinite": (with_value(-np.inf), StudyError, ["1 voxels", "infinite", "Repair"]),
    "all zero": (np.zeros(SHAPE, np.float32), StudyError, ["all zero", "Export it again, or remove"]),
    "constant": (np.full(SHAPE, 7, np.float32), StudyError, ["constant at 7", "Export it again, or remove"]),
    "cropped": (
        make_head("t2f")[:, 1:],
        StudyError,
        ["28×31×24 at 6×6×7 mm", "t1n is 28×32×24 at 6×6×7 mm", "Register and resample"],
    ),
    "spacing": (
        image(make_head("t2f"), np.diag([6, 6, 3.5, 1])),
        StudyError,
        ["28×32×24 at 6×6×3.5 mm", "t1n is 28×32×24 at 6×6×7 mm", "Register and resample"],
    ),
    "displaced": (
        image(make_head("t2f"), DISPLACED),
        StudyError,
        ["placed elsewhere", "2.5 mm", "Register and resample"],
    ),
    "4D": (TWO_VOLUMES, VolumeError, ["28×32×24×2", "2 volumes, wanted one", "Split it"]),
}


def refusal(kind: type[CrossmrError], act: Callable[[], Any], *wanted: str) -> str:
    """The one line with which `act` is refused, which holds everything that is wanted."""
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for text in wanted:
        assert text in message
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    bad, kind, wanted = REFUSED[name]
    volumes = {"t1n": image(make_head()), "t2f": image(bad) if isinstance(bad, np.ndarray) else bad}
    message = refusal(kind, lambda: load_study(volumes, "P1"), "t2f", *wanted)
    assert message.startswith("P1: t2f")


@pytest.mark.parametrize("shape", [(7, 7, 24), (1, 6, 40), (4, 4, 4)])
def test_too_small_is_refused(shape):
    data = np.random.default_rng(0).random(shape).astype(np.float32)
    size = "×".join(map(str, shape))
    message = refusal(StudyError, lambda: load(t1n=data), f"t1n is {size}", "too small", "Export")
    assert message.startswith("P1: ")


def test_few_slices_are_not_too_small():
    data = make_head(shape=(28, 32, 5))
    assert overlap(load(t1n=data).mask, ellipsoid(data.shape).T) > 0.9


@pytest.mark.parametrize("inverted", [False, True])
def test_no_head_is_refused(inverted):
    data = 100 - speck() if inverted else speck()
    wanted = "no head was found", "voxels above the background", "t1n, t2f", "Look at the volumes"
    assert refusal(StudyError, lambda: load(t1n=data, t2f=data), *wanted).startswith("P1: ")


def test_a_truncated_file_is_refused(tmp_path):
    path = write_study(tmp_path, "P1") / "P1-t1c.nii.gz"
    path.write_bytes(path.read_bytes()[:-3000])
    refusal(VolumeError, lambda: from_folder(tmp_path), "P1: P1-t1c.nii.gz", "truncated", "Copy the file again")


def test_an_unpacked_file_that_is_too_short_is_refused(tmp_path):
    path = write_study(tmp_path, "P1") / "P1-t1c.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    refusal(VolumeError, lambda: from_folder(tmp_path), "P1: P1-t1c.nii.gz", "truncated", "Copy the file again")


def test_a_text_file_is_refused(tmp_path):
    path = write_study(tmp_path, "P1") / "P1-t1c.nii.gz"
    path.write_text("<html>404 Not Found</html>" * 40)
    refusal(VolumeError, lambda: from_folder(tmp_path), "P1: P1-t1c.nii.gz", "not a NIfTI file", "Convert")


def test_two_files_of_one_modality_are_refused(tmp_path):
    path = write_study(tmp_path, "P1") / "P1-t1n.nii.gz"
    (tmp_path / "P1" / "P1-t1w.nii.gz").write_bytes(path.read_bytes())
    refusal(
        *(NamingError, lambda: from_folder(tmp_path)),
        *("P1: 2 files claim to be t1n", "P1-t1n.nii.gz", "P1-t1w.nii.gz", "Keep one"),
    )


def test_a_label_on_another_grid_is_refused(tmp_path):
    """In a folder whose files do not name the patient, so that the message has to."""
    (tmp_path / "patient12").mkdir()
    nib.save(image(make_head()), tmp_path / "patient12" / "t1.nii.gz")
    nib.save(image(np.ones((28, 32, 23), np.uint8)), tmp_path / "patient12" / "seg.nii.gz")
    message = refusal(
        *(VolumeError, lambda: from_folder(tmp_path)),
        *("seg.nii.gz: is 28×32×23", "28×32×24 at 6×6×7 mm", "Resample the segmentation"),
    )
    assert message.startswith("patient12: ")


def test_a_probability_map_is_no_label(tmp_path):
    write_study(tmp_path, "P1", replace={"seg": np.full(SHAPE, 0.3, np.float32)})
    refusal(VolumeError, lambda: from_folder(tmp_path), "P1: P1-seg.nii.gz", "no segmentation", "Threshold")


# -------------------------------------------------------------------------------------------- synthetic


def synthetic(modality: str) -> nib.Nifti1Image:
    return image(make_head(modality), description=f"SYNTHETIC {modality} by crossmr 0.1.0 from t1n+t2f")


def test_a_synthetic_volume_counts_as_missing():
    study = load_study({"t1n": image(make_head()), "t1c": synthetic("t1c")})
    assert list(study.volumes) == ["t1n"]
    assert list(study.normalisation) == ["t1n"]
    assert study.notes == ("t1c is itself synthetic, so it was not used as an input.",)


def test_a_synthetic_volume_is_not_even_checked():
    shifted = image(make_head("t1c")[1:], description="SYNTHETIC")
    assert list(load_study({"t1n": image(make_head()), "t1c": shifted}).volumes) == ["t1n"]


def test_other_descriptions_are_no_mark():
    study = load_study({"t1n": image(make_head(), description="not SYNTHETIC")})
    assert (list(study.volumes), study.notes) == (["t1n"], ())


def test_a_study_of_synthetic_volumes_only_is_refused():
    volumes = {m: synthetic(m) for m in ("t1n", "t1c")}
    message = refusal(StudyError, lambda: load_study(volumes, "P1"), "no acquired volume", "T1, T1ce, T2, FLAIR")
    assert message.startswith("P1: ")


# ------------------------------------------------------------------------------------------- real scans


def real(name: str) -> Path:
    if not (SCANS / name).is_dir():
        pytest.skip(f"needs the real scan {name} in {SCANS}")
    return SCANS / name


@pytest.mark.parametrize(
    ("name", "modalities", "shape"),
    [
        ("brats/BraTS-GLI-00000-000", ("t1n", "t2f"), (155, 240, 240)),
        ("openms/patient07", ("t1c", "t2w"), (182, 218, 182)),
    ],
)
def test_real_stripped_brains(name, modalities, shape):
    (files,) = find_studies(real(name))
    assert list(files.images()) == ["t1n", "t1c", "t2w", "t2f"]
    study = load_study(files, allow=modalities)
    assert study.mask.shape == shape
    assert study.masked_background
    assert 0.1 < study.mask.mean() < 0.25
    assert ndimage.label(study.mask)[1] == 1
    assert study.labels is not None
    assert study.mask[study.labels > 0].mean() > 0.99
    for modality in modalities:
        normalised = study.normalised(modality)
        assert 0 == normalised.min() < normalised.max() <= 1
        assert np.median(normalised[study.mask]) == pytest.approx(0.25, abs=1e-5)
        assert (normalised[~study.mask] == 0).all()


def test_a_real_head_with_its_skull():
    study = from_folder(real("lgg/TCGA-CS-4942"))
    assert list(study.volumes) == ["t1n", "t1c", "t2f"]
    assert not study.masked_background
    assert 0.3 < study.mask.mean() < 0.5
    for modality in study.volumes:
        assert np.median(study.normalised(modality)[~study.mask]) < 0.01


def test_holes_are_filled_slice_by_slice_as_scipy_does():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.5, 0.7, 1.0):
        mask = rng.random((5, 17, 14)) < share
        np.testing.assert_array_equal(fill_slices(mask), np.stack([ndimage.binary_fill_holes(plane) for plane in mask]))
