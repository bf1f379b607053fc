"""One patient's study: refused in one line, or on one grid with a head mask and intensities in [0, 1]."""

import gzip
import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, ellipsoid, header_alone, image, make_head, write_study
from nibabel.orientations import inv_ornt_aff
from scipy import ndimage

from crossmr.data.head import fit_normalisation
from crossmr.data.naming import find_studies
from crossmr.data.study import ALLOCATED, Study, StudyMemory, load_study, study_memory
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


@pytest.mark.parametrize("order", [("t1n", "t2f"), ("t2f", "t1n")])
def test_grids_that_differ_by_rounding_are_one_grid_and_the_first_volume_s(order):
    nudged = AFFINE.copy()
    nudged[:3, 3] += 0.004
    nudged[0, 0] += 1e-4
    images = {"t1n": image(make_head()), "t2f": image(make_head("t2f"), nudged)}
    study = load_study({m: images[m] for m in order})
    assert list(study.volumes) == ["t1n", "t2f"]
    np.testing.assert_array_equal(study.reference.image.affine, AFFINE)


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


# --------------------------------------------------------------------------------------------- refusals


def with_value(value: float, where: Any = (3, 4, 5)) -> np.ndarray:
    data = make_head("t2f")
    data[where] = value
    return data


def speck() -> np.ndarray:
    data = np.zeros(SHAPE, np.float32)
    data[12:15, 12:15, 12:15] = np.random.default_rng(0).uniform(50, 100, (3, 3, 3))
    return data


TWO_VOLUMES = np.stack([make_head("t2f")] * 2, axis=-1)
DISPLACED = AFFINE + np.array([[0, 0, 0, 0], [0, 0, 0, 2.5], [0, 0, 0, 0], [0, 0, 0, 0]])
REFUSED: dict[str, tuple[Any, type[CrossmrError], list[str]]] = {
    "nan": (with_value(np.nan, (14, 16, 12)), StudyError, ["1 voxels within the head", "NaN", "Repair"]),
    "slice of nan": (with_value(np.nan, np.s_[:, :, 12]), StudyError, ["896 voxels within the head", "Repair"]),
    "all nan": (np.full(SHAPE, np.nan, np.float32), StudyError, ["21504 voxels", "NaN", "Repair"]),
    "constant beside nan": (np.where(HEAD.T, 1, np.float32(np.nan)), StudyError, ["constant at 1", "remove the file"]),
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
    "4D": (TWO_VOLUMES, VolumeError, ["28×32×24×2", "2 volumes, expected one", "Split it"]),
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


BRAIN = np.pad(ellipsoid()[::2, ::2, ::2], [(7, 7), (8, 8), (6, 6)])
"""Half as long as the head in each direction."""


def masked(modality: str, outside: float = 0, mask: np.ndarray = HEAD.T) -> np.ndarray:
    return np.where(mask, make_head(modality), np.float32(outside))


@pytest.mark.parametrize("offset", [0, -100], ids=["magnitude", "with negative values"])
@pytest.mark.parametrize("air", [True, False])
def test_nan_outside_the_head_is_background_and_said(air, offset):
    """As SPM, FSL and AFNI mask, or as reslicing leaves what was not acquired."""
    plain, holed = make_head("t2f", air=air) + np.float32(offset), masked("t2f", np.nan) + np.float32(offset)
    if air:
        holed = plain.copy()
        holed[:3], holed[:, :, -2:], holed[5, 5, 5] = np.nan, np.nan, np.nan
    study, wanted = (load(t1n=make_head(air=air), t2f=data) for data in (holed, plain))
    assert np.isfinite(study.volumes["t2f"].data).all()
    assert overlap(study.mask, wanted.mask) > 0.97
    deviation = np.abs(study.normalised("t2f") - wanted.normalised("t2f"))[study.mask & wanted.mask]
    assert np.median(deviation) < 0.01
    count = int(np.isnan(holed).sum())
    assert study.notes == (f"FLAIR has {count} voxels of NaN outside the head, which were taken for background.",)


def test_how_much_of_the_head_is_nan_is_said():
    data = make_head("t2f")
    data[:, :, :6] = np.nan  # beyond the field of view of one scan
    study = load(t1n=make_head(), t2f=data)
    assert "They are 8% of what other volumes show of the head." in study.notes[0]
    assert not study.normalised("t2f")[:6].any()


@pytest.mark.parametrize("outside", [0, np.nan])
@pytest.mark.parametrize("air", [True, False])
def test_a_brain_among_heads_is_normalised_within_what_it_has_and_said(outside, air):
    study = load(t1n=masked("t1n", outside, BRAIN), t2w=make_head("t2w", air=air), t2f=masked("t2f", 0, BRAIN))
    alone = load(t1n=masked("t1n", 0, BRAIN), t2f=masked("t2f", 0, BRAIN))
    assert "T2 has a skull, T1 and FLAIR have none: each was normalised within what it has." in study.notes[-1]
    assert list(study.stripped) == ["t1n", "t2f"]
    assert overlap(study.mask, HEAD) > 0.9
    assert overlap(study.mask_of("t1n"), BRAIN.T) > 0.95
    for modality in ("t1n", "t2f"):
        np.testing.assert_allclose(study.normalised(modality), alone.normalised(modality), atol=1e-6)
    assert np.median(study.normalised("t2w")[study.mask]) == pytest.approx(1 / 3, abs=1e-5)


def test_heads_masked_differently_and_brains_stripped_differently_are_not_told_apart():
    tight = ndimage.binary_erosion(BRAIN[:, :, :], structure=np.ones((1, 1, 3)))
    for volumes in (
        {"t1n": make_head(air=False), "t2f": make_head("t2f")},
        {"t1n": make_head(air=False), "t2f": masked("t2f", np.nan)},
        {"t1n": masked("t1n", 0, BRAIN), "t2f": masked("t2f", 0, tight)},
        {"t1n": make_head(), "t2f": np.where(np.arange(SHAPE[2]) < 10, 0, make_head("t2f"))},  # half as high
    ):
        study = load(**volumes)
        assert not study.stripped
        assert not any("skull" in note for note in study.notes)


@pytest.mark.parametrize("lost", ["a rim", "the front"])
def test_what_one_masked_volume_lacks_of_the_head_is_nothing_and_does_not_enter_its_scale(lost):
    tight = ndimage.binary_erosion(HEAD.T, structure=np.ones((3, 1, 1)))
    if lost == "the front":
        first, last = np.flatnonzero(HEAD.any((0, 2)))[[0, -1]]
        tight = HEAD.T & (np.arange(SHAPE[1])[:, None] < last - 0.2 * (last - first))
    whole, part = masked("t1n", 0, HEAD.T), masked("t2f", 0, tight)
    study, alone = load(t1n=whole, t2f=part), load(t2f=part)
    assert not study.stripped
    assert overlap(study.mask_of("t2f"), tight.T) > 0.95
    np.testing.assert_allclose(study.normalised("t2f"), alone.normalised("t2f"), atol=1e-6)
    assert not study.normalised("t2f")[study.mask & ~study.mask_of("t2f")].any()
    assert any("less of the head than the others: what it lacks counts as not acquired" in n for n in study.notes)


@pytest.mark.parametrize("air", [True, False])
@pytest.mark.parametrize("fill", [0, -50, np.nan])
def test_what_lies_beyond_a_tilted_field_of_view_is_nothing_and_does_not_enter_the_scale(fill, air):
    """As a slab is left by resampling it onto another scan's grid: with wedges of one value."""
    x, _, z = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    seen = (np.abs(z + 0.6 * x) < 7).T
    whole = make_head("t2f", air=air)
    study, wanted = (
        load(t1n=make_head(), t2f=np.where(seen.T, whole, np.float32(fill))),
        load(t1n=make_head(), t2f=whole),
    )
    within = study.mask & seen
    assert 0.05 < 1 - within.sum() / study.mask.sum() < 0.4
    assert overlap(study.mask_of("t2f"), within) > 0.97
    assert not study.normalised("t2f")[study.mask & ~study.mask_of("t2f")].any()
    alone = fit_normalisation(wanted.volumes["t2f"].data, within)
    np.testing.assert_allclose(study.normalisation["t2f"].low, alone.low, atol=0.03 * (alone.high - alone.low))
    np.testing.assert_allclose(study.normalisation["t2f"].high, alone.high, atol=0.03 * (alone.high - alone.low))
    assert any("less of the head than the others: what it lacks counts as not acquired" in n for n in study.notes)
    assert not wanted.parts


def test_slices_that_were_not_acquired_do_not_enter_the_scale():
    whole = make_head("t2f")
    cut = np.where(np.arange(SHAPE[2]) < 10, np.float32(0), whole)
    study, full = load(t1n=make_head(), t2f=cut), load(t1n=make_head(), t2f=whole)
    assert np.median(study.normalised("t2f")[10:][study.mask[10:]]) == pytest.approx(1 / 3, abs=1e-3)
    fitted, wanted = study.normalisation["t2f"], full.normalisation["t2f"]
    assert (fitted.high - fitted.low) / (wanted.high - wanted.low) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("shape", [(7, 7, 24), (1, 6, 40), (4, 4, 4)])
def test_too_small_is_refused(shape):
    data = np.random.default_rng(0).random(shape).astype(np.float32)
    size = "×".join(map(str, shape))
    message = refusal(StudyError, lambda: load(t1n=data), f"t1n is {size}", "too small", "Export")
    assert message.startswith("P1: ")


@pytest.mark.parametrize("factor", [0.001, 0.01, 10])
def test_voxels_in_metres_or_ten_times_too_large_are_refused(factor):
    grown = image(make_head(), np.diag([6.0 * factor, 6.0 * factor, 7.0 * factor, 1.0]))
    refusal(StudyError, lambda: load_study({"t1n": grown}, "P1"), "no scan of a head is", "they are in mm")


def test_few_slices_are_not_too_small():
    data = make_head(shape=(28, 32, 5))
    assert overlap(load(t1n=data).mask, ellipsoid(data.shape).T) > 0.9


@pytest.mark.parametrize("inverted", [False, True])
def test_no_head_is_refused(inverted):
    data = 100 - speck() if inverted else speck()
    wanted = "no head was found", "voxels above the background", "t1n, t2f", "Look at the volumes"
    assert refusal(StudyError, lambda: load(t1n=data, t2f=data), *wanted).startswith("P1: ")


@pytest.mark.parametrize("air", [0, 3])
def test_a_masked_volume_beside_the_head_is_refused(air):
    head = np.pad(make_head(), ((0, 28), (0, 0), (0, 0)))
    head = np.hypot(head, np.random.default_rng(0).normal(0, air, head.shape)).astype(np.float32)
    brain = np.pad(
        np.where(ndimage.binary_erosion(HEAD.T, iterations=3), make_head("t2f"), 0), ((28, 0), (0, 0), (0, 0))
    )
    refusal(StudyError, lambda: load(t1n=head, t2f=brain), "P1: t2f shows nothing where", "Register it")


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
    refusal(
        VolumeError, lambda: from_folder(tmp_path), "P1: P1-t1c.nii.gz", "a web page, not a volume", "Download it again"
    )


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
    refusal(VolumeError, lambda: from_folder(tmp_path), "P1: P1-seg.nii.gz", "not a segmentation", "Threshold")


@pytest.mark.parametrize("grid", [SHAPE, (28, 32, 23)])
def test_a_file_that_is_a_label_by_its_folder_alone_stops_no_study(tmp_path, grid):
    write_study(tmp_path / "images", "P1", ("t1n", "t2w"))
    (tmp_path / "labels").mkdir()
    nib.save(image(np.full(grid, 0.3, np.float32)), tmp_path / "labels" / "P1.nii.gz")
    study = from_folder(tmp_path)
    assert study.labels is None
    (note,) = study.notes
    assert note.startswith("the segmentation *.nii.gz is not used: *.nii.gz: is ")
    assert str(tmp_path) not in note


def test_the_segmentation_is_left_alone_on_request(tmp_path):
    write_study(tmp_path, "P1", replace={"seg": np.full(SHAPE, 0.3, np.float32)})
    (files,) = find_studies(tmp_path)
    assert load_study(files, labels=False).labels is None


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


def test_files_that_are_synthetic_are_not_to_be_named(tmp_path):
    for modality in ("t1c", "t2f"):
        nib.save(synthetic(modality), tmp_path / f"P1-{modality}_synthetic.nii.gz")
    (study,) = find_studies(tmp_path)
    listed = "P1-t1c_synthetic.nii.gz, P1-t2f_synthetic.nii.gz"
    message = refusal(StudyError, lambda: load_study(study), f"{listed} are synthetic: give the folder of the scans")
    assert "--map" not in message
    nib.save(image(make_head()), tmp_path / "P1-scan.nii.gz")
    (study,) = find_studies(tmp_path)
    message = refusal(StudyError, lambda: load_study(study), "the names of P1-scan.nii.gz say none of them", "--map")
    assert "P1-t1c_synthetic" not in message


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
        assert np.median(normalised[study.mask]) == pytest.approx(1 / 3, abs=1e-5)
        assert (normalised[~study.mask] == 0).all()


def test_a_real_head_with_its_skull():
    study = from_folder(real("lgg/TCGA-CS-4942"))
    assert list(study.volumes) == ["t1n", "t1c", "t2f"]
    assert not study.masked_background
    assert 0.3 < study.mask.mean() < 0.5
    for modality in study.volumes:
        assert np.median(study.normalised(modality)[~study.mask]) < 0.01


def test_a_volume_is_normalised_in_little_more_memory_than_it_takes():
    rng = np.random.default_rng(1)
    head = np.pad(rng.uniform(50, 99, (44, 44, 44)).astype(np.float32), 10)
    study = load_study({"t1n": image(head), "t2w": image(head * 2)})
    tracemalloc.start()
    normalised = study.normalised("t1n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * normalised.nbytes


def test_memory_is_estimated_by_the_headers_of_files_and_images_alike(tmp_path):
    files = {m: tmp_path / f"{m}.nii.gz" for m in ("t1n", "t2w")}
    for path in files.values():
        header_alone(path, 500)
    memory = study_memory(files)
    assert memory.shape == (500, 500, 500)
    assert 8 < memory.kept < memory.reading < 40
    assert memory.bytes() == ALLOCATED * 500**3 * memory.reading
    assert memory.bytes(memory.kept) == memory.bytes() < memory.bytes(100) == ALLOCATED * 500**3 * 100
    images = {m: nib.Nifti1Image(np.broadcast_to(np.int16(0), (500,) * 3), np.eye(4)) for m in files}
    assert study_memory(images) == memory
    assert study_memory(files, "if needed").bytes() > memory.bytes() > study_memory({"t1n": files["t1n"]}).bytes()
    files["t1n"].write_bytes(b"no image")
    nothing = study_memory({"t1n": files["t1n"], "t2w": tmp_path / "none"})
    assert nothing == StudyMemory()
    assert nothing.bytes(100) == 0


def test_a_study_is_read_within_the_estimate():
    shape = (128, 128, 96)
    images = {m: image(make_head(m, shape=shape).astype(np.int16)) for m in ("t1n", "t2w", "t2f")}
    tracemalloc.start()
    load_study(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = study_memory(images)
    assert 0.5 * estimate.bytes() < peak < estimate.bytes()
