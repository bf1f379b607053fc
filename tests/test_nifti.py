"""NIfTI files: what is broken is refused in one line, what is written is whole."""

import errno
import gzip
import os
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import SHAPE, affine_of, patched, save, scan

from crossmr.data.formats import content_sha256
from crossmr.data.nifti import read_header, write_volume
from crossmr.data.volume import on_grid, read_volume
from crossmr.errors import OutputError, VolumeError


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(scan(affine_of(np.eye(3))), tmp_path / "scan.nii")


def refused(source: object, pattern: str) -> None:
    with pytest.raises(VolumeError, match=pattern) as error:
        read_volume(source)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


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


class TestWrite:
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


def test_no_header_is_read_where_the_system_does_not_let_one_look(tmp_path: Path) -> None:
    """A link into another user's folder, or a name that is too long."""
    assert read_header(tmp_path / ("x" * 300)) is None
    with pytest.raises(VolumeError, match="cannot be read"):
        read_volume(tmp_path / ("x" * 300))
