"""The phantom is a patient per seed, whose contrasts obey MR physics and whose files are BraTS studies."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from crossmr.errors import ConfigError
from crossmr.phantom import Phantom, make_phantom, write_cohort
from crossmr.phantom.anatomy import Tissue
from crossmr.phantom.scanner import MODALITIES

SMALL = {"shape": (48, 56, 40), "spacing_mm": (3.8, 3.8, 4.4)}
"""The default field of view at half the resolution."""


@pytest.fixture(scope="module")
def patient() -> Phantom:
    return make_phantom(3, lesion=True)


@pytest.fixture(scope="module")
def small() -> Phantom:
    return make_phantom(3, lesion=True, **SMALL)


def median(phantom: Phantom, modality: str, tissue: Tissue) -> float:
    return float(np.median(phantom.images[modality][phantom.tissues == tissue]))


def test_same_seed_gives_the_same_bytes(small: Phantom) -> None:
    first, second = small, make_phantom(3, lesion=True, **SMALL)
    for modality in MODALITIES:
        assert first.images[modality].tobytes() == second.images[modality].tobytes()
    assert first.labels.tobytes() == second.labels.tobytes()
    assert first.tissues.tobytes() == second.tissues.tobytes()


def test_seeds_differ_in_anatomy(small: Phantom) -> None:
    assert 0.05 < np.mean(small.tissues != make_phantom(4, **SMALL).tissues) < 0.6


def test_one_seed_is_one_anatomy_at_any_resolution(patient: Phantom, small: Phantom) -> None:
    fine_mm3 = np.count_nonzero(patient.labels) * 1.9 * 1.9 * 2.2
    coarse_mm3 = np.count_nonzero(small.labels) * 3.8 * 3.8 * 4.4
    assert coarse_mm3 == pytest.approx(fine_mm3, rel=0.25)


def test_arrays_are_what_is_documented(patient: Phantom) -> None:
    assert tuple(patient.images) == MODALITIES
    for image in patient.images.values():
        assert image.shape == (96, 112, 80)
        assert image.dtype == np.float32
        assert np.isfinite(image).all()
        assert image.min() >= 0
    assert patient.labels.dtype == patient.tissues.dtype == np.uint8
    assert set(np.unique(patient.labels)) == {0, 1, 2, 3}
    assert patient.affine.dtype == np.float64
    assert nib.aff2axcodes(patient.affine) == ("R", "A", "S")


def test_brain_has_the_size_of_a_brain(patient: Phantom) -> None:
    litre = 1e6 / (1.9 * 1.9 * 2.2)
    grey = np.count_nonzero(np.isin(patient.tissues, [Tissue.GREY, Tissue.DEEP_GREY])) / litre
    white = np.count_nonzero(np.isin(patient.tissues, [Tissue.WHITE, Tissue.OEDEMA])) / litre
    assert 0.3 < grey < 0.9
    assert 0.3 < white < 0.9


def test_left_and_right_are_alike_but_not_equal() -> None:
    white = make_phantom(2, lesion=False, **SMALL).tissues == Tissue.WHITE
    mirrored = white[::-1]
    dice = 2 * np.count_nonzero(white & mirrored) / (2 * np.count_nonzero(white))
    assert 0.5 < dice < 0.98


def test_contrasts_of_the_healthy_brain(patient: Phantom) -> None:
    csf, grey, white = Tissue.CSF, Tissue.GREY, Tissue.WHITE
    assert median(patient, "t1n", white) > median(patient, "t1n", grey) > median(patient, "t1n", csf)
    assert median(patient, "t2w", csf) > median(patient, "t2w", grey) > median(patient, "t2w", white)
    assert median(patient, "t2f", grey) > median(patient, "t2f", white) > 1.5 * median(patient, "t2f", csf)
    assert median(patient, "t1n", Tissue.FAT) > median(patient, "t1n", white) > median(patient, "t1n", Tissue.BONE)


def test_contrasts_of_the_lesion(patient: Phantom) -> None:
    def enhancement(tissue: Tissue) -> float:
        """t1c over t1n, each relative to white matter: scales are arbitrary."""
        after = median(patient, "t1c", tissue) / median(patient, "t1c", Tissue.WHITE)
        return after / (median(patient, "t1n", tissue) / median(patient, "t1n", Tissue.WHITE))

    assert median(patient, "t2f", Tissue.OEDEMA) > 1.2 * median(patient, "t2f", Tissue.GREY)
    assert median(patient, "t2w", Tissue.OEDEMA) > 1.2 * median(patient, "t2w", Tissue.WHITE)
    assert median(patient, "t1n", Tissue.OEDEMA) < median(patient, "t1n", Tissue.WHITE)
    assert enhancement(Tissue.ENHANCING) > 1.3
    assert enhancement(Tissue.OEDEMA) < 1.15
    assert enhancement(Tissue.NECROSIS) < 1.2 < enhancement(Tissue.VESSEL)


def test_labels_follow_the_brats_convention(patient: Phantom) -> None:
    for label, tissue in ((1, Tissue.NECROSIS), (2, Tissue.OEDEMA), (3, Tissue.ENHANCING)):
        np.testing.assert_array_equal(patient.labels == label, patient.tissues == tissue)
    low, high = (np.argwhere(np.isin(patient.labels, [1, 3])).min(0), np.argwhere(patient.labels == 2).max(0))
    assert (high > low).all()


def test_lesion_can_be_chosen_and_is_otherwise_drawn(small: Phantom) -> None:
    coarse = {"shape": (32, 37, 32), "spacing_mm": (5.7, 5.7, 5.5)}
    has_lesion = [make_phantom(seed, **coarse).labels.any() for seed in range(8)]
    assert any(has_lesion)
    assert not all(has_lesion)
    assert small.labels.any()
    assert not make_phantom(3, lesion=False, **SMALL).labels.any()


def test_a_lesion_leaves_the_rest_of_the_head_alone(small: Phantom) -> None:
    healthy = make_phantom(3, lesion=False, **SMALL)
    outside = np.isin(small.tissues, [Tissue.AIR, Tissue.FAT, Tissue.MUSCLE, Tissue.SKIN])
    np.testing.assert_array_equal(small.tissues[outside], healthy.tissues[outside])


def test_without_skull_the_background_is_exactly_zero(small: Phantom) -> None:
    whole, stripped = small, make_phantom(3, skull=False, lesion=True, **SMALL)
    background = stripped.tissues == Tissue.AIR
    assert 0.5 < background.mean() < 0.95
    for modality in MODALITIES:
        assert (stripped.images[modality][background] == 0).all()
        assert (stripped.images[modality][~background] > 0).mean() > 0.99
        np.testing.assert_array_equal(stripped.images[modality][~background], whole.images[modality][~background])
        assert np.count_nonzero(whole.images[modality][background]) > 0
    assert not np.isin(stripped.tissues, [Tissue.FAT, Tissue.SKIN, Tissue.MUSCLE, Tissue.MARROW]).any()


def test_stripping_leaves_no_holes_in_the_brain() -> None:
    brain = make_phantom(3, skull=False, **SMALL).images["t2w"] > 0
    holes = [ndimage.binary_fill_holes(axial) & ~axial for axial in np.moveaxis(brain, 2, 0)]
    assert np.count_nonzero(holes) < 5e-4 * np.count_nonzero(brain)


def test_other_grids_see_the_same_head() -> None:
    phantom = make_phantom(0, shape=(32, 40, 33), spacing_mm=(6.0, 5.5, 5.0))
    assert phantom.labels.shape == (32, 40, 33)
    assert np.isin([Tissue.AIR, Tissue.FAT, Tissue.GREY, Tissue.WHITE], phantom.tissues).all()
    inside = make_phantom(0, shape=(32, 32, 32), spacing_mm=(1.0, 1.0, 1.0))
    assert Tissue.AIR not in inside.tissues


def test_cohort_on_disk(tmp_path: Path) -> None:
    names = write_cohort(tmp_path / "new", 2, seed=7, missing={1: ["t1c", "t2f"]}, lesion=True, **SMALL)
    assert names == ["PHANTOM-00000-000", "PHANTOM-00001-000"]
    files = sorted(path.name for path in (tmp_path / "new").rglob("*.nii.gz"))
    assert files == sorted(
        [f"{names[0]}-{kind}.nii.gz" for kind in (*MODALITIES, "seg")]
        + [f"{names[1]}-{kind}.nii.gz" for kind in ("t1n", "t2w", "seg")]
    )
    for path in (tmp_path / "new" / names[0]).iterdir():
        image = nib.load(path)
        assert image.shape == SMALL["shape"]
        assert image.header.get_xyzt_units()[0] == "mm"
        assert image.header["descrip"].item() == b"crossmr phantom"
        assert image.get_data_dtype() == (np.uint8 if path.name.endswith("seg.nii.gz") else np.int16)
        (sform, sform_code), (qform, qform_code) = image.get_sform(coded=True), image.get_qform(coded=True)
        assert (sform_code, qform_code) == (1, 1)
        np.testing.assert_allclose(sform, qform, atol=1e-4)
        np.testing.assert_allclose(nib.affines.voxel_sizes(sform), SMALL["spacing_mm"], rtol=1e-6)
        assert len(np.unique(np.asarray(image.dataobj))) > 2


def test_stored_intensities_are_neither_clipped_nor_crushed(tmp_path: Path) -> None:
    (name,) = write_cohort(tmp_path, 1, **SMALL)
    for modality in MODALITIES:
        stored = np.asarray(nib.load(tmp_path / name / f"{name}-{modality}.nii.gz").dataobj)
        assert 300 < stored.max() < 32767


def test_a_patient_does_not_depend_on_the_others(tmp_path: Path) -> None:
    write_cohort(tmp_path / "few", 1, seed=5, **SMALL)
    write_cohort(tmp_path / "more", 2, seed=5, **SMALL)
    write_cohort(tmp_path / "else", 1, seed=6, **SMALL)
    few, more, other = (
        np.asarray(nib.load(tmp_path / folder / "PHANTOM-00000-000/PHANTOM-00000-000-t2f.nii.gz").dataobj)
        for folder in ("few", "more", "else")
    )
    np.testing.assert_array_equal(few, more)
    assert (few != other).mean() > 0.5


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        (0, {"shape": (96, 31, 80)}, r"\(96, 31, 80\).*32"),
        (0, {"shape": (96, 96)}, r"\(96, 96\).*three"),
        (0, {"spacing_mm": (1.0, 0.0, 1.0)}, r"\(1.0, 0.0, 1.0\).*mm"),
        (0, {"spacing_mm": (1.0, float("nan"), 1.0)}, "nan"),
        (-1, {}, "-1.*0 or more"),
    ],
)
def test_nonsense_is_refused(seed: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_phantom(seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("patients", "options", "message"),
    [
        (0, {}, "got 0, expected 1"),
        (2, {"missing": {0: ["flair"]}}, "flair.*patient 0.*t2f"),
        (2, {"missing": {2: ["t1n"]}}, "patient 2, expected 0 to 1"),
        (1, {"seed": -3}, "-3"),
    ],
)
def test_nonsense_cohorts_are_refused_before_anything_is_written(
    tmp_path: Path, patients: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_cohort(tmp_path / "cohort", patients, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "cohort").exists()


def test_a_contrast_that_is_missing_now_does_not_stay_of_an_earlier_cohort(tmp_path: Path) -> None:
    write_cohort(tmp_path, 1, seed=0, **SMALL)
    write_cohort(tmp_path, 1, seed=1, missing={0: ["t1c"]}, **SMALL)
    assert not (tmp_path / "PHANTOM-00000-000" / "PHANTOM-00000-000-t1c.nii.gz").exists()
