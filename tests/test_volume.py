"""NIfTI in and out: geometry exact, errors in one line."""

import gzip
import hashlib
import itertools
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes
from niftis import ORIENTATIONS, SHAPE, affine_of, geometry, patched, save, scan

from crossmr.data.formats import content_sha256
from crossmr.data.nifti import write_volume
from crossmr.data.volume import Volume, describe_grid, displacement_mm, on_grid, read_labels, read_volume, same_grid
from crossmr.errors import VolumeError

SCANS = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(scan(affine_of(np.eye(3))), tmp_path / "scan.nii")


def assert_in_place(volume: Volume, image: nib.Nifti1Image) -> None:
    """Every voxel of the canonical array is where the original one was, in mm."""
    original = np.asanyarray(image.dataobj)
    for z, y, x in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), tuple(n - 1 for n in volume.data.shape)]:
        where = np.argwhere(original == volume.data[z, y, x])
        assert len(where) == 1
        np.testing.assert_allclose(
            apply_affine(volume.affine, (x, y, z)), apply_affine(image.affine, where[0]), atol=1e-4
        )


class TestOrientation:
    @pytest.mark.parametrize("rotation", ORIENTATIONS, ids=lambda r: "".join(aff2axcodes(affine_of(r))))
    def test_all_48(self, rotation: np.ndarray) -> None:
        image = scan(affine_of(rotation))
        volume = read_volume(image)
        assert aff2axcodes(volume.affine) == ("R", "A", "S")
        assert volume.data.dtype == np.float32
        assert volume.data.flags.c_contiguous
        assert volume.data.flags.writeable
        canonical = nib.as_closest_canonical(image)
        np.testing.assert_array_equal(volume.data, np.asanyarray(canonical.dataobj).T)
        np.testing.assert_array_equal(volume.affine, canonical.affine)
        np.testing.assert_allclose(volume.spacing_mm, canonical.header.get_zooms()[::-1])
        assert_in_place(volume, image)
        back = on_grid(volume.data, volume, description="")
        np.testing.assert_array_equal(back.get_fdata(), image.get_fdata())
        np.testing.assert_array_equal(back.affine, image.affine)

    def test_the_frame(self) -> None:
        """LPS in the file: first voxel is left-most in columns of ours, so it comes last."""
        volume = read_volume(scan(affine_of(np.diag([-1, -1, 1]))))
        assert volume.data.shape == (6, 5, 4)
        assert volume.spacing_mm == (3, 2, 1)
        assert volume.data[0, -1, -1] == 0  # stored (0, 0, 0): most right, most anterior, most inferior
        assert volume.data[1, -1, -1] == 1  # stored (0, 0, 1): one slice up

    @settings(derandomize=True, max_examples=40, deadline=None)
    @given(
        quaternion=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1),
        mirrored=st.booleans(),
        spacing=st.tuples(*[st.floats(0.25, 8)] * 3),
        codes=st.sampled_from([(1, 1), (0, 1), (2, 0), (0, 0), (4, 3)]),
        kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
        suffix=st.sampled_from([".nii", ".nii.gz"]),
    )
    def test_oblique_round_trip_is_bit_exact(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        quaternion: tuple[float, ...],
        mirrored: bool,
        spacing: tuple[float, ...],
        codes: tuple[int, int],
        kind: type,
        suffix: str,
    ) -> None:
        folder = tmp_path_factory.mktemp("oblique")
        rotation = nib.quaternions.quat2mat(quaternion) * ([-1, 1, 1] if mirrored else [1, 1, 1])
        image = scan(affine_of(rotation, spacing), sform=codes[0], qform=codes[1], kind=kind)
        source, result = save(image, folder / f"in{suffix}"), folder / f"out{suffix}"
        volume = read_volume(source)
        assert_in_place(volume, nib.load(source))
        write_volume(on_grid(volume.data, volume, description="SYNTHETIC"), result)
        assert geometry(result) == geometry(source)
        np.testing.assert_array_equal(nib.load(result).get_fdata(), nib.load(source).get_fdata())
        np.testing.assert_array_equal(nib.load(result).affine, nib.load(source).affine)
        assert type(nib.load(result)) is type(nib.load(source))

    def test_disagreeing_sform_and_qform_both_survive(self, plain: Path, tmp_path: Path) -> None:
        other = affine_of(ORIENTATIONS[5], (1, 2, 3))
        image = nib.load(plain)
        image.header.set_qform(other, code=3)
        source = save(nib.Nifti1Image(image.dataobj, image.affine, image.header), tmp_path / "both.nii")
        volume = read_volume(source)
        np.testing.assert_array_equal(volume.image.affine, image.affine)  # the sform wins
        write_volume(on_grid(volume.data, volume, description=""), tmp_path / "out.nii")
        assert geometry(tmp_path / "out.nii") == geometry(source)

    def test_qfac_of_zero_survives_where_it_means_nothing(self, tmp_path: Path) -> None:
        source = save(scan(np.eye(4), sform=2, qform=0), tmp_path / "in.nii")
        patched(source, pixdim=[0, 1, 1, 1, 0, 0, 0, 0])
        volume = read_volume(source)
        write_volume(on_grid(volume.data, volume, description=""), tmp_path / "out.nii")
        assert geometry(tmp_path / "out.nii") == geometry(source)

    def test_qfac_of_zero_means_one(self, plain: Path) -> None:
        before = read_volume(plain).affine
        after = read_volume(patched(plain, sform_code=0, pixdim=[0, 1, 2, 3, 0, 0, 0, 0])).affine
        np.testing.assert_allclose(after, before, atol=1e-5)


class TestRead:
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
    def test_every_dtype_and_byte_order(self, tmp_path: Path, dtype: str, order: str) -> None:
        header = nib.Nifti1Header(endianness=order)
        header.set_data_dtype(dtype)
        data = np.arange(120).reshape(SHAPE).astype(dtype)
        source = save(nib.Nifti1Image(data, np.diag([-1, 1, 1, 1]), header), tmp_path / "a.nii.gz")
        volume = read_volume(source)
        np.testing.assert_array_equal(volume.data, data[::-1].T)
        assert volume.data.dtype == np.dtype("=f4")
        write_volume(on_grid(volume.data, volume, description=""), tmp_path / "b.nii.gz")
        assert geometry(tmp_path / "b.nii.gz") == geometry(source)
        np.testing.assert_array_equal(nib.load(tmp_path / "b.nii.gz").get_fdata(), data)

    @pytest.mark.parametrize(("slope", "inter"), [(0.5, -3), (2, 0), (1, 0), (0, 7), (np.nan, 0)])
    def test_scaling(self, plain: Path, slope: float, inter: float) -> None:
        patched(plain, scl_slope=slope, scl_inter=inter)
        np.testing.assert_allclose(read_volume(plain).data, nib.load(plain).get_fdata().T, rtol=1e-6)

    def test_in_memory_and_file_agree(self, plain: Path) -> None:
        image = nib.load(plain)
        a, b = read_volume(plain), read_volume(image)
        np.testing.assert_array_equal(a.data, b.data)
        assert same_grid(a, b)
        assert (a.name, b.name) == ("scan.nii", "scan.nii")
        assert read_volume(scan(np.eye(4))).name == "in-memory image"
        assert read_volume(str(plain), name="P1 t1n").name == "P1 t1n"

    def test_an_images_own_affine_counts_where_its_header_says_another(self, plain: Path, tmp_path: Path) -> None:
        image = nib.load(plain)
        image.affine[:3, 3] += (10, 20, 30)
        nib.save(image, tmp_path / "saved.nii")
        given, saved = read_volume(image), read_volume(tmp_path / "saved.nii")
        np.testing.assert_array_equal(given.affine, saved.affine)
        np.testing.assert_array_equal(given.image.affine, image.affine)

    def test_in_memory_data_is_not_shared(self) -> None:
        data = np.zeros(SHAPE, np.float32, order="F")
        read_volume(nib.Nifti1Image(data, np.eye(4))).data[:] = 1
        assert not data.any()

    @pytest.mark.parametrize("tail", [(1,), (1, 1)])
    def test_trailing_axes_of_one_are_dropped(self, tmp_path: Path, tail: tuple[int, ...]) -> None:
        data = np.arange(120, dtype=np.int16).reshape(*SHAPE, *tail)
        source = save(nib.Nifti1Image(data, affine_of(np.eye(3))), tmp_path / "a.nii.gz")
        for volume in (read_volume(source), read_volume(nib.load(source))):
            assert volume.data.shape == (6, 5, 4)
            back = on_grid(volume.data, volume, description="")
            assert back.shape == back.header.get_data_shape() == SHAPE
            np.testing.assert_array_equal(back.affine, nib.load(source).affine)
            np.testing.assert_array_equal(back.get_fdata(), data.reshape(SHAPE))

    def test_odd_values_are_not_judged(self) -> None:
        data = np.full(SHAPE, np.nan)
        data[0] = np.inf
        data[1] = 1e300
        volume = read_volume(nib.Nifti1Image(data, np.eye(4)))
        assert np.isnan(volume.data).any()
        assert np.isinf(volume.data).any()

    def test_content_counts_not_the_name(self, plain: Path, tmp_path: Path) -> None:
        content = plain.read_bytes()
        (tmp_path / "plain.nii.gz").write_bytes(content)
        (tmp_path / "packed.nii").write_bytes(gzip.compress(content, mtime=0))
        for name in ("plain.nii.gz", "packed.nii"):
            np.testing.assert_array_equal(read_volume(tmp_path / name).data, read_volume(plain).data)

    def test_the_header_says_synthetic(self, plain: Path) -> None:
        assert not read_volume(plain).synthetic
        assert read_volume(patched(plain, descrip=b"SYNTHETIC t2f by crossmr")).synthetic

    def test_no_voxels_are_kept_in_the_reference(self, plain: Path) -> None:
        assert not np.asanyarray(read_volume(plain).image.dataobj).any()
        assert not any(np.asanyarray(read_volume(plain).image.dataobj).strides)


class TestLabels:
    def test_read_on_the_images_grid(self, tmp_path: Path) -> None:
        image = scan(affine_of(ORIENTATIONS[11]))
        like = read_volume(image)
        labels = np.zeros(SHAPE, np.float64)
        labels[1, 2, 3] = 4
        labels = read_labels(save(nib.Nifti1Image(labels, image.affine), tmp_path / "seg.nii.gz"), like)
        assert (labels.dtype, labels.shape, labels.sum()) == (np.uint8, like.data.shape, 4)
        assert like.data[labels > 0] == np.asanyarray(image.dataobj)[1, 2, 3]

    def test_another_orientation_of_the_same_grid_is_fine(self) -> None:
        image = nib.Nifti1Image(np.arange(120, dtype=np.uint8).reshape(SHAPE), affine_of(np.diag([-1, -1, 1])))
        like = read_volume(image)
        np.testing.assert_array_equal(read_labels(nib.as_closest_canonical(image), like), like.data)

    def test_other_grids_are_refused(self) -> None:
        like = read_volume(scan(affine_of(np.eye(3))), name="t1n.nii")
        shifted = affine_of(np.eye(3))
        shifted[0, 3] += 0.02
        with pytest.raises(VolumeError, match=r"is 4×5×6 at 1×2×3 mm, but t1n.nii is .* up to 0.02 mm elsewhere"):
            read_labels(scan(shifted), like)
        with pytest.raises(VolumeError, match=r"is 4×5×7 at 1×1×1 mm, but t1n.nii is 4×5×6 at 1×2×3 mm\. Resample"):
            read_labels(nib.Nifti1Image(np.zeros((4, 5, 7), np.uint8), np.eye(4)), like)

    @pytest.mark.parametrize("value", [0.5, -1, 256, np.nan, np.inf])
    def test_other_values_are_refused(self, value: float) -> None:
        labels = np.zeros(SHAPE, np.float32)
        labels[0, 0, 0] = value
        image = nib.Nifti1Image(labels, np.eye(4))
        with pytest.raises(VolumeError, match="1 voxels are not whole numbers from 0 to 255"):
            read_labels(image, read_volume(image))


class TestWrite:
    def test_header(self, plain: Path, tmp_path: Path) -> None:
        image = nib.load(plain)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
        image.header["db_name"] = image.header["data_type"] = b"Jane Doe"
        image.header["aux_file"] = image.header["descrip"] = b"Jane Doe, 1970"
        image.header.set_intent("label", name="Jane Doe")
        patched(save(image, tmp_path / "jane.nii"), scl_slope=7, scl_inter=1)
        for source in (tmp_path / "jane.nii", nib.load(tmp_path / "jane.nii")):
            reference = read_volume(source)
            array = np.linspace(0, 1, 120, dtype=np.float32).reshape(6, 5, 4)
            result = on_grid(array, reference, description="SYNTHETIC t2f", display_range=(0, 0.5))
            write_volume(result, tmp_path / "out.nii")
            content = (tmp_path / "out.nii").read_bytes()
            header = nib.Nifti1Header(content[:348], check=False)
            assert header.get_data_dtype() == np.float32
            assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
            assert (header["cal_min"], header["cal_max"]) == (0, 0.5)
            assert header.get_intent() == ("none", (), "")
            assert (header["vox_offset"], len(content)) == (352, 352 + 4 * 120)
            assert header["descrip"].item() == b"SYNTHETIC t2f"
            assert b"Jane" not in content
            assert geometry(tmp_path / "out.nii") == geometry(tmp_path / "jane.nii")
            np.testing.assert_array_equal(read_volume(tmp_path / "out.nii").data, array)
            assert read_volume(tmp_path / "out.nii").synthetic

    def test_the_reference_is_untouched_and_nothing_is_shared(self) -> None:
        reference = read_volume(scan(np.eye(4)))
        before = reference.image.header.binaryblock
        array = np.zeros_like(reference.data)
        result = on_grid(array, reference, description="x" * 79)
        array[:] = 1
        assert not result.get_fdata().any()
        assert reference.image.header.binaryblock == before

    @pytest.mark.parametrize("description", ["x" * 80, "contrasté"])
    def test_descriptions_that_do_not_fit(self, description: str) -> None:
        reference = read_volume(scan(np.eye(4)))
        with pytest.raises(ValueError, match="ASCII of at most 79"):
            on_grid(reference.data, reference, description=description)

    def test_arrays_that_do_not_fit(self) -> None:
        reference = read_volume(scan(np.eye(4)))
        with pytest.raises(ValueError, match="expected the same"):
            on_grid(reference.data.T, reference, description="")


class TestGrid:
    def test_same_grid(self) -> None:
        a = read_volume(scan(affine_of(np.eye(3))))
        for axis, shift, same in ((0, 0.009, True), (0, 0.011, False), (2, 0.02, True), (2, -0.04, False)):
            affine = affine_of(np.eye(3))  # of 1 × 2 × 3 mm
            affine[axis, 3] += shift
            assert same_grid(a, read_volume(scan(affine))) is same
        assert not same_grid(a, read_volume(nib.Nifti1Image(np.zeros((4, 5, 7), np.uint8), a.affine)))

    @pytest.mark.parametrize("turn", [np.eye(3), np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])])
    def test_the_farthest_corner_decides_whether_grids_are_one(self, turn: np.ndarray) -> None:
        """A spacing or an angle that is rounded moves the far end of a long side most."""
        shape, grow, tilt = (200, 200, 20), np.eye(4), np.eye(4)
        grow[0, 0], tilt[2, 1] = 1 + 1e-5, 1e-4  # 0.002 and 0.02 voxels at the far end
        affine = np.eye(4)
        affine[:3, :3] = turn
        a, grown, tilted, longer = (
            read_volume(nib.Nifti1Image(np.zeros(size, np.uint8), affine @ change))
            for change, size in ((np.eye(4), shape), (grow, shape), (tilt, shape), (tilt, (200, 40, 20)))
        )
        assert same_grid(a, grown)
        assert same_grid(grown, a)
        assert not same_grid(a, tilted)
        assert displacement_mm(a, tilted) == pytest.approx(0.0199, rel=1e-3)
        assert same_grid(longer, read_volume(nib.Nifti1Image(np.zeros((200, 40, 20), np.uint8), affine)))

    def test_describe_grid_speaks_of_the_files_axes(self) -> None:
        sagittal = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
        volume = read_volume(scan(affine_of(sagittal, (1.875, 1, 5))))
        assert describe_grid(volume) == "4×5×6 at 1.875×1×5 mm"


def test_content_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 99)
    assert content_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 99).hexdigest()
    with pytest.raises(VolumeError, match="cannot be read"):
        content_sha256(tmp_path / "b")


def real(name: str) -> Path:
    if not (SCANS / name).exists():
        pytest.skip(f"needs the real scan {name} in {SCANS}")
    return SCANS / name


class TestRealScans:
    @pytest.mark.parametrize(
        "scan",
        [
            "brats/BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz",
            "lgg/TCGA-CS-4941/TCGA-CS-4941-t2f.nii.gz",
            "brats/Brats18_2013_21_1/Brats18_2013_21_1-t1c.nii.gz",
            "openms/patient07/patient07-t2f.nii.gz",
        ],
    )
    def test_round_trip(self, scan: str, tmp_path: Path) -> None:
        file = real(scan)
        volume = read_volume(file)
        canonical = nib.as_closest_canonical(nib.load(file))
        np.testing.assert_array_equal(volume.data, canonical.get_fdata(dtype=np.float32).T)
        write_volume(on_grid(volume.data, volume, description="SYNTHETIC"), tmp_path / "a.nii.gz")
        assert geometry(tmp_path / "a.nii.gz") == geometry(file)
        np.testing.assert_array_equal(
            nib.load(tmp_path / "a.nii.gz").dataobj, nib.load(file).get_fdata(dtype=np.float32)
        )

    def test_labels_of_another_header_style(self) -> None:
        folder = real("brats/BraTS-GLI-00000-000")
        image = read_volume(folder / f"{folder.name}-t1n.nii.gz")
        assert set(np.unique(read_labels(folder / f"{folder.name}-seg.nii.gz", image))) <= {0, 1, 2, 3, 4}
        assert describe_grid(image) == "240×240×155 at 1×1×1 mm"


def test_storing_along_other_axes_is_read_alike_however_oblique():
    """About 45° from two axes nibabel's choice depends on the order of the file's axes; drawn by hypothesis once."""
    affine = np.eye(4)
    affine[:3, :3] = [[-0.480, 0.099, -0.096], [-0.138, -0.346, 0.334], [0, -0.347, -0.360]]
    data = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    image = nib.Nifti1Image(data, affine)
    first = read_volume(image)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turned = image.as_reoriented(np.stack([order, flips], axis=1))
            again = read_volume(turned)
            np.testing.assert_array_equal(again.data, first.data)
            np.testing.assert_allclose(again.affine, first.affine, atol=1e-6)
            back = on_grid(again.data, again, description="same")
            np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(turned.dataobj))


def test_scaled_voxels_are_read_in_little_more_memory_than_they_take(tmp_path):
    stored = np.arange(64**3, dtype=np.int16).reshape(64, 64, 64)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.3, -7)
    image.header["vox_offset"] = 352
    path = tmp_path / "scaled.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + stored.tobytes(order="F"))
    tracemalloc.start()
    data = read_volume(path).data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * (data.nbytes + stored.nbytes)
    np.testing.assert_array_equal(data, np.asarray(nib.load(path).dataobj).T.astype(np.float32))
