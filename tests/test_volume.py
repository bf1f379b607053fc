"""NIfTI in and out: geometry exact, errors in one line."""

import errno
import gzip
import hashlib
import itertools
import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import aff2axcodes

from crossmr.data.formats import content_sha256
from crossmr.data.volume import (
    Volume,
    describe_grid,
    displacement_mm,
    on_grid,
    read_header,
    read_labels,
    read_volume,
    same_grid,
    write_volume,
)
from crossmr.errors import OutputError, VolumeError

SCANS = Path(__file__).parents[2] / "shared" / "data"
GEOMETRY = (
    *("dim", "pixdim", "xyzt_units"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
SHAPE = (4, 5, 6)
ORIENTATIONS = [
    np.array(np.eye(3)[list(axes)] * signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


def affine_of(rotation: np.ndarray, spacing: tuple[float, ...] = (1, 2, 3)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = (-10.5, 20.25, 3)
    return affine


def scan(affine: np.ndarray, *, sform: int = 1, qform: int = 1, kind: type = nib.Nifti1Image) -> nib.Nifti1Image:
    """An image whose every voxel has another value."""
    header = kind.header_class()
    header.set_data_dtype(np.int16)
    header.set_xyzt_units("mm", "sec")
    image = kind(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), None, header)
    image.header.set_zooms(voxel_sizes(affine))
    if qform:
        image.header.set_qform(affine, code=qform)
    if sform:
        image.header.set_sform(affine, code=sform)
    return kind(image.dataobj, image.header.get_best_affine(), image.header)


def geometry(path: Path) -> dict[str, bytes]:
    """The raw header fields of a file, without any of nibabel's repairs."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    kind = nib.Nifti1Header if nib.Nifti1Header.may_contain_header(content[:348]) else nib.Nifti2Header
    header = kind(content[: kind.template_dtype.itemsize], check=False)
    return {field: header[field].tobytes() for field in GEOMETRY}


def save(image: nib.Nifti1Image, path: Path) -> Path:
    nib.save(image, path)
    return path


def patched(path: Path, **fields: object) -> Path:
    """Overwrite raw header fields of an uncompressed NIfTI-1 file."""
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.binaryblock + content[348:])
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(scan(affine_of(np.eye(3))), tmp_path / "scan.nii")


def refused(source: object, pattern: str) -> None:
    with pytest.raises(VolumeError, match=pattern) as error:
        read_volume(source)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


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


class TestBrokenInputs:
    def test_not_there(self, tmp_path: Path) -> None:
        refused(tmp_path / "a.nii.gz", "a.nii.gz: cannot be read.*No such file")
        refused(tmp_path, "cannot be read.*Is a directory")

    def test_no_permission(self, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def deny(path: Path) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", deny)
        refused(plain, r"scan\.nii: cannot be read \(Permission denied\)")

    @pytest.mark.parametrize("keep", [3, 20, 100, 300, -9, -1])
    def test_truncated_gzip(self, plain: Path, tmp_path: Path, keep: int) -> None:
        noise = np.random.default_rng(0).integers(0, 999, (9, 9, 9), dtype=np.int16)
        packed = gzip.compress(nib.Nifti1Image(noise, np.eye(4)).to_bytes())
        (tmp_path / "a.nii.gz").write_bytes(packed[:keep])
        refused(tmp_path / "a.nii.gz", r"^a\.nii\.gz: the gzip data is truncated or damaged")

    def test_damaged_gzip(self, plain: Path, tmp_path: Path) -> None:
        packed = bytearray(gzip.compress(plain.read_bytes(), 0, mtime=0))
        packed[600] ^= 255
        (tmp_path / "a.nii.gz").write_bytes(packed)
        refused(tmp_path / "a.nii.gz", "gzip data is truncated or damaged .*incorrect data check")

    def test_truncated_plain(self, plain: Path) -> None:
        plain.write_bytes(plain.read_bytes()[:-1])
        refused(plain, r"is truncated: 591 bytes, but its header announces 592")

    @pytest.mark.parametrize(
        ("content", "pattern"),
        [
            (b"", r"is empty \(0 bytes\)"),
            (b"this is a text file\n" * 99, "not a NIfTI"),
            (gzip.compress(b"\0\0\0\1" * 200, mtime=0), "not a NIfTI"),
            (gzip.compress(b"short", mtime=0), "not a NIfTI"),
            (bytes(128) + b"DICM" + bytes(900), "is DICOM"),
            (nib.MGHImage(np.zeros(SHAPE, np.float32), np.eye(4)).to_bytes(), "not a NIfTI"),
            (nib.nifti1.Nifti1PairHeader().binaryblock, "pair"),
        ],
    )
    def test_something_else(self, tmp_path: Path, content: bytes, pattern: str) -> None:
        (tmp_path / "a.nii.gz").write_bytes(content)
        refused(tmp_path / "a.nii.gz", f"^a.nii.gz: .*{pattern}")

    def test_other_images(self) -> None:
        refused(nib.GiftiImage(), "got GiftiImage, expected a file, an image of nibabel, or")
        refused(np.zeros(SHAPE), r"got ndarray, expected .*\(array, affine\)")

    def test_arrays_that_are_no_volume(self) -> None:
        voxels, affine = np.ones(SHAPE, np.float32), np.eye(4)
        refused((voxels > 0, affine), "voxels are bool, expected one real number")
        refused((voxels.astype(complex), affine), "voxels are complex128, expected one real number")
        refused((voxels[0], affine), "is 2D")
        refused((voxels, np.eye(3)), "its affine is 3×3, expected 4×4")
        refused((voxels, np.zeros((4, 4))), "its affine has no inverse")
        refused((voxels, np.full((4, 4), np.nan)), "its affine has no inverse")
        refused((voxels, "RAS"), "is none of numbers")
        refused((voxels, affine, "t1"), r"got tuple, expected .*\(array, affine\)")

    @pytest.mark.parametrize(
        ("shape", "pattern"),
        [
            ((4, 5, 6, 7), "is 4×5×6×7: 7 volumes, expected one. Split it"),
            ((4, 5, 6, 1, 3), "3 volumes"),
            ((4, 5), "is 2D"),
            ((4, 0, 6), "no voxels"),
        ],
    )
    def test_not_a_volume(self, tmp_path: Path, shape: tuple[int, ...], pattern: str) -> None:
        image = nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4))
        refused(image, pattern)
        (tmp_path / "a.nii").write_bytes(image.to_bytes())
        refused(tmp_path / "a.nii", pattern)

    @pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
    def test_not_one_number_a_voxel(self, dtype: object) -> None:
        refused(nib.Nifti1Image(np.zeros(SHAPE, dtype), np.eye(4)), "voxels are (complex|RGB)")

    @pytest.mark.parametrize("spacing", [0, np.nan, np.inf])
    def test_spacing(self, plain: Path, spacing: float) -> None:
        refused(patched(plain, pixdim=[1, 1, spacing, 1, 0, 0, 0, 0]), f"spacing is 1×{spacing:g}×1 mm")

    @pytest.mark.parametrize(
        ("fields", "pattern"),
        [
            ({"srow_x": 0}, "no inverse"),
            ({"srow_x": [0, 1, 0, 0], "srow_y": [0, 1, 0, 0]}, "no inverse"),
            ({"srow_y": np.nan}, "no inverse"),
            ({"srow_z": [0, 0, 1e-30, 0]}, "no inverse"),
            ({"srow_z": [0, 0, 1e30, 0]}, "no inverse"),
            ({"sform_code": 0, "quatern_b": 3}, "qform makes no sense"),
            ({"sform_code": 0, "quatern_b": np.nan}, "no inverse|qform makes no sense"),
            ({"datatype": 9999}, "broken NIfTI header"),
            ({"vox_offset": np.nan}, "broken NIfTI header"),
            ({"vox_offset": 1e9}, "truncated"),
            ({"scl_slope": 1, "scl_inter": np.inf}, "broken NIfTI header"),
            ({"dim": [3, -1, 1, 1, 1, 1, 1, 1]}, "broken NIfTI header"),
            ({"dim": [3, -5, 1, 1, 1, 1, 1, 1]}, "no voxels"),
            ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "truncated"),
        ],
    )
    def test_senseless_headers(self, plain: Path, fields: dict[str, object], pattern: str) -> None:
        refused(patched(plain, **fields), f"^scan.nii: .*({pattern})")

    @settings(derandomize=True, max_examples=150, deadline=None)
    @given(where=st.integers(0, 347), value=st.integers(0, 255))
    def test_any_damaged_header_byte_is_read_or_refused(self, where: int, value: int) -> None:
        content = bytearray(scan(affine_of(np.eye(3))).to_bytes())
        content[where] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda _: bytes(content))
            try:
                volume = read_volume(Path("a.nii"))
            except VolumeError:
                return
        on_grid(volume.data, volume, description="").to_bytes()


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

    def test_equal_content_gives_equal_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reference = read_volume(scan(np.eye(4)))
        for name, now in (("a.nii.gz", 1e9), ("b.nii.gz", 1.5e9)):
            monkeypatch.setattr("time.time", lambda now=now: now)
            write_volume(on_grid(reference.data, reference, description="x"), tmp_path / name)
        assert content_sha256(tmp_path / "a.nii.gz") == content_sha256(tmp_path / "b.nii.gz")
        assert not list(tmp_path.glob("*.partial"))

    @pytest.mark.parametrize("endianness", "<>")
    @pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
    def test_the_bytes_are_those_of_the_image_packed_at_once(
        self, tmp_path: Path, kind: type[nib.Nifti1Image], endianness: str
    ) -> None:
        header = kind.header_class(endianness=endianness)
        header.set_data_dtype(np.float32)
        data = np.random.default_rng(0).normal(size=(70, 60, 50)).astype(np.float32)
        image = on_grid(data.T, read_volume(kind(data, affine_of(np.eye(3)), header)), description="x")
        write_volume(image, tmp_path / "a.nii")
        write_volume(image, tmp_path / "a.nii.gz")
        assert (tmp_path / "a.nii").read_bytes() == image.to_bytes()
        assert (tmp_path / "a.nii.gz").read_bytes() == gzip.compress(image.to_bytes(), 1, mtime=0)

    def test_beside_the_image_a_slice_is_in_memory(self, tmp_path: Path) -> None:
        image = nib.Nifti1Image(np.ones((128, 128, 64), np.float32), np.eye(4))
        tracemalloc.start()
        try:
            write_volume(image, tmp_path / "a.nii.gz")
            assert tracemalloc.get_traced_memory()[1] < 128 * 128 * 64  # a quarter of the image
        finally:
            tracemalloc.stop()

    def test_it_replaces_and_makes_folders(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "a.nii"
        for value in (1, 2):
            write_volume(nib.Nifti1Image(np.full(SHAPE, value, np.float32), np.eye(4)), path)
        assert read_volume(path).data.max() == 2

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        path = tmp_path / "a.nii.gz"
        path.write_bytes(b"old")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, step, full)
        with pytest.raises(OutputError, match=r"a\.nii\.gz could not be written: No space left on device"):
            write_volume(scan(np.eye(4)), path)
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.nii.gz", b"old")]

    def test_an_interruption_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_volume(scan(np.eye(4)), tmp_path / "a.nii")
        assert not list(tmp_path.iterdir())

    def test_places_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="could not be written"):
            write_volume(scan(np.eye(4)), tmp_path / "file" / "a.nii")
        with pytest.raises(OutputError, match=r"Give a name that ends in \.nii or \.nii\.gz"):
            write_volume(scan(np.eye(4)), tmp_path / "a.png")


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


def test_no_header_is_read_where_the_system_does_not_let_one_look(tmp_path: Path) -> None:
    """A link into another user's folder, or a name that is too long."""
    assert read_header(tmp_path / ("x" * 300)) is None
    with pytest.raises(VolumeError, match="cannot be read"):
        read_volume(tmp_path / ("x" * 300))


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
