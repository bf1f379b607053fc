"""Other formats: the same voxels at the same place as in NIfTI, one volume per pair, and one line for what is none."""

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from conftest import SHAPE, image, make_head, save_untrained, voxels, write_study
from test_tree import LAYOUTS

from crossmr.completion.cohort import complete_cohort
from crossmr.completion.inputs import find_inputs
from crossmr.completion.study import complete
from crossmr.data.formats import content_sha256, header_of, is_volume, parts, stem_of, without_images_of_pairs
from crossmr.data.naming import find_studies, recognise, study_of
from crossmr.data.nifti import is_synthetic, read_header, write_volume
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.data.study import load_study
from crossmr.data.volume import describe_grid, on_grid, read_grid, read_labels, read_volume, same_grid
from crossmr.errors import NamingError, StudyError, VolumeError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model

ITK = ("mha", "mhd", "nrrd", "nhdr")
FREESURFER = ("mgz", "mgh")
PAIRS = ("hdr", "img", "hdr.gz", "img.gz")


def rotated(x, y, z):
    """A rotation about the axes by these degrees."""
    turn = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        a, b = [k for k in range(3) if k != axis]
        one = np.eye(3)
        one[[a, a, b, b], [a, b, a, b]] = (
            np.array([1, -1, 1, 1])
            * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))] * 2)[[0, 1, 1, 0]]
        )
        turn = turn @ one
    return turn


def affine(direction, spacing=(1.5, 0.7, 3.0), origin=(-31.5, 44.25, 12.0)):
    made = np.eye(4)
    made[:3, :3] = np.asarray(direction, float) * spacing
    made[:3, 3] = origin
    return made


AFFINES = {
    "RAS": affine(np.eye(3)),
    "LPS": affine(np.diag([-1, -1, 1])),
    "left-handed": affine(np.diag([-1, 1, 1])),
    "sagittal": affine([[0, 0, -1], [1, 0, 0], [0, 1, 0]]),
    "coronal": affine([[-1, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "oblique": affine(rotated(12, -7, 20)),
    "oblique sagittal": affine(rotated(3, 9, -14) @ [[0, 0, 1], [1, 0, 0], [0, -1, 0]]),
}


def numbered(shape=(4, 5, 6), dtype=np.int16):
    return np.random.default_rng(3).integers(0, 900, shape).astype(dtype)


def as_itk(data, where):
    """An ITK image of voxels (x, y, z[, t]) and an affine in RAS+."""
    made = SimpleITK.GetImageFromArray(np.ascontiguousarray(data.T), isVector=False)
    axes = data.ndim
    steps = np.diag([-1.0, -1, 1]) @ where[:3, :3]
    sides = np.linalg.norm(steps, axis=0)
    direction, spacing, origin = np.eye(axes), np.ones(axes), np.zeros(axes)
    direction[:3, :3], spacing[:3], origin[:3] = steps / sides, sides, np.diag([-1.0, -1, 1]) @ where[:3, 3]
    made.SetDirection(direction.ravel().tolist())
    made.SetSpacing(spacing.tolist())
    made.SetOrigin(origin.tolist())
    return made


def write(path, data, where):
    """A file of the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".mgz", ".mgh")):
        nib.save(nib.MGHImage(data, where), path)
    elif path.suffix.removeprefix(".") in ITK:
        SimpleITK.WriteImage(as_itk(data, where), str(path))
    elif ".hdr" in path.name or ".img" in path.name:
        nib.save(nib.Nifti1Pair(data, where), path)
    else:
        nib.save(nib.Nifti1Image(data, where), path)
    return path


def refused(path, *said):
    with pytest.raises(VolumeError) as error:
        read_volume(path)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    for text in said:
        assert text in str(error.value), str(error.value)


@pytest.mark.parametrize("where", AFFINES)
@pytest.mark.parametrize("ending", [*FREESURFER, *ITK, "hdr", "img.gz"])
def test_the_same_voxels_at_the_same_place(ending, where, tmp_path):
    data = numbered()
    nifti = read_volume(write(tmp_path / "a.nii.gz", data, AFFINES[where]))
    other = read_volume(write(tmp_path / f"b.{ending}", data, AFFINES[where]))
    assert np.array_equal(other.data, nifti.data)
    assert np.allclose(other.affine, nifti.affine, atol=1e-4)
    assert np.allclose(other.spacing_mm, nifti.spacing_mm, atol=1e-5)
    assert same_grid(other, nifti)
    announced = read_grid(tmp_path / f"b.{ending}")
    assert same_grid(announced, nifti)
    assert describe_grid(announced) == describe_grid(other)
    header = read_header(tmp_path / f"b.{ending}")
    assert header.get_data_shape() == (4, 5, 6)
    assert header.get_data_dtype().newbyteorder("=") == np.int16


@pytest.mark.parametrize("ending", ["mgz", "nrrd", "hdr"])
def test_what_is_written_on_such_a_grid_is_nifti_there(ending, tmp_path):
    volume = read_volume(write(tmp_path / f"a.{ending}", numbered(), AFFINES["oblique sagittal"]))
    write_volume(on_grid(volume.data / 2, volume, description="SYNTHETIC t2f"), tmp_path / "b.nii.gz")
    made = nib.load(tmp_path / "b.nii.gz")
    assert type(made) is nib.Nifti1Image
    assert made.header["magic"].item() == b"n+1"
    assert np.allclose(made.affine, AFFINES["oblique sagittal"], atol=1e-4)
    assert np.allclose(made.get_qform(), AFFINES["oblique sagittal"], atol=1e-4)
    assert np.array_equal(np.asarray(made.dataobj), numbered() / 2)
    assert same_grid(read_volume(tmp_path / "b.nii.gz"), volume)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
@pytest.mark.parametrize("ending", ["mgz", "mha", "nrrd", "hdr"])
def test_kinds_of_numbers(ending, dtype, tmp_path):
    data = (numbered() % 250).astype(dtype)
    assert np.array_equal(read_volume(write(tmp_path / f"a.{ending}", data, np.eye(4))).data, data.T)


@pytest.mark.parametrize("ending", ["mgz", "mha", "nrrd", "nii.gz"])
def test_one_volume_in_four_dimensions_is_one_and_two_are_not(ending, tmp_path):
    one, two = (np.stack([numbered()] * n, -1) for n in (1, 2))
    one = numbered() if ending == "mgz" else one  # nibabel writes no other
    assert np.array_equal(read_volume(write(tmp_path / f"one.{ending}", one, AFFINES["LPS"])).data.shape, (6, 5, 4))
    refused(write(tmp_path / f"two.{ending}", two, AFFINES["LPS"]), "2 volumes, expected one")


@pytest.mark.parametrize("ending", ["mha", "nrrd"])
def test_vectors_complex_numbers_and_planes_are_refused(ending, tmp_path):
    vectors = SimpleITK.GetImageFromArray(np.zeros((6, 5, 4, 3), np.float32), isVector=True)
    SimpleITK.WriteImage(vectors, str(tmp_path / f"v.{ending}"))
    refused(tmp_path / f"v.{ending}", "voxels are vector of 32-bit float, expected one real number each")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((6, 5), np.float32)), str(tmp_path / f"p.{ending}"))
    refused(tmp_path / f"p.{ending}", "is 2D")


class TestPairs:
    @pytest.mark.parametrize("kind", [nib.nifti1.Nifti1Pair, nib.nifti2.Nifti2Pair])
    @pytest.mark.parametrize("endianness", "<>")
    def test_a_nifti_pair_is_what_its_header_says(self, kind, endianness, tmp_path):
        header = kind.header_class(endianness=endianness)
        header.set_data_dtype(np.int16)
        pair = kind(numbered().astype(np.float32) / 4 + 7, AFFINES["oblique"], header)
        pair.set_qform(AFFINES["RAS"], 1)
        pair.header["descrip"] = b"SYNTHETIC t1c"
        nib.save(pair, tmp_path / "a.hdr")
        for path in (tmp_path / "a.hdr", tmp_path / "a.img"):
            volume = read_volume(path)
            assert np.allclose(volume.data, numbered().T / 4 + 7, atol=0.02)
            assert np.allclose(volume.image.affine, AFFINES["oblique"], atol=1e-5)
            assert np.allclose(volume.image.get_qform(), AFFINES["RAS"], atol=1e-5)
            assert volume.image.header.endianness == endianness
            assert volume.synthetic
            assert is_synthetic(path)
        made = on_grid(volume.data, volume, description="x")
        assert np.allclose(read_volume(type(made).from_bytes(made.to_bytes())).data, volume.data)

    def test_an_offset_is_that_of_the_image(self, tmp_path):
        nib.save(nib.Nifti1Pair(numbered(), AFFINES["RAS"]), tmp_path / "a.hdr")
        content = (tmp_path / "a.img").read_bytes()
        start = bytearray((tmp_path / "a.hdr").read_bytes())
        start[108:112] = np.float32(16).tobytes()
        (tmp_path / "a.hdr").write_bytes(start)
        (tmp_path / "a.img").write_bytes(bytes(16) + content)
        assert np.array_equal(read_volume(tmp_path / "a.hdr").data, numbered().T)
        (tmp_path / "a.img").write_bytes(content)
        refused(tmp_path / "a.hdr", "is truncated: 240 bytes, but its header announces 256")

    @pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage])
    def test_analyze_runs_to_the_left_and_that_is_said(self, kind, tmp_path):
        analyze = kind(numbered(), np.diag([-1.5, 0.7, 3, 1]))
        nib.save(analyze, tmp_path / "a.img")
        if (tmp_path / "a.mat").exists():
            (tmp_path / "a.mat").unlink()
        volume = read_volume(tmp_path / "a.hdr")
        assert np.array_equal(volume.data, numbered()[::-1].T)
        assert volume.spacing_mm == pytest.approx((3, 0.7, 1.5))
        assert "does not say which side is left" in volume.remark

    def test_spm_says_which_side_is_left(self, tmp_path):
        nib.save(nib.Spm99AnalyzeImage(numbered(), AFFINES["oblique"]), tmp_path / "a.img")
        volume = read_volume(tmp_path / "a.hdr")
        assert np.allclose(volume.image.affine, AFFINES["oblique"], atol=1e-5)
        assert volume.remark == ""

    @pytest.mark.parametrize("orient", [1, 2, 3, 4, 5])
    def test_analyze_of_other_planes_is_refused(self, orient, tmp_path):
        nib.save(nib.AnalyzeImage(numbered(), np.diag([-1.5, 0.7, 3, 1])), tmp_path / "a.img")
        start = bytearray((tmp_path / "a.hdr").read_bytes())
        start[252] = orient
        (tmp_path / "a.hdr").write_bytes(start)
        refused(tmp_path / "a.hdr", ("axial", "coronal", "sagittal")[orient % 3], "Convert it to .nii.gz")

    def test_the_other_half_must_be_there(self, tmp_path):
        for name in ("a.hdr", "b.hdr.gz", "c.mhd", "d.nhdr"):
            path = write(tmp_path / name, numbered(), np.eye(4))
            parts(path)[1].unlink()
            refused(path, "which holds its voxels, is not", "Copy both")

    def test_a_pair_is_one_volume(self, tmp_path):
        names = ["a.hdr", "a.img", "b.img", "c.HDR", "c.IMG.gz", "d.nii", "d.img", "notes.txt"]
        assert without_images_of_pairs(names) == ["a.hdr", "b.img", "c.HDR", "d.nii", "d.img", "notes.txt"]
        for ending in ("hdr", "img", "mhd", "nhdr"):
            write(tmp_path / f"{ending}-t1n.{ending}", numbered(), np.eye(4))
        assert {path.name for study in find_studies(tmp_path) for path in study.paths()} == {
            *("hdr-t1n.hdr", "img-t1n.hdr", "mhd-t1n.mhd", "nhdr-t1n.nhdr")
        }
        assert header_of(tmp_path / "img-t1n.img") == tmp_path / "img-t1n.hdr"
        files = [path for path in tmp_path.iterdir() if path.name.startswith("hdr")]
        assert [path.name for path in study_of(files).paths()] == ["hdr-t1n.hdr"]
        assert [path.name for path in study_of([tmp_path / "mhd-t1n.raw"]).paths()] == ["mhd-t1n.mhd"]


@pytest.mark.parametrize("name", ["a.hdr", "a.hdr.gz", "a.mhd", "a.nhdr", "a.mgz", "a.nii.gz"])
def test_a_hash_is_of_all_the_files_of_a_volume(name, tmp_path):
    path = write(tmp_path / name, numbered(), np.eye(4))
    before, header = content_sha256(path), path.read_bytes()
    assert content_sha256(path) == before
    write(path, numbered() + 1, np.eye(4))
    assert content_sha256(path) != before
    if len(parts(path)) > 1:
        assert path.read_bytes() == header or name == "a.hdr.gz"


@pytest.mark.parametrize("ending", ["mgz", "mgh", "mha", "nrrd"])
def test_what_is_cut_off_or_is_something_else_is_refused(ending, tmp_path):
    whole = write(tmp_path / f"a.{ending}", numbered(), np.eye(4)).read_bytes()
    for name, content in (("cut", whole[:-90]), ("text", b"hello, this is no volume" * 30), ("short", b"x")):
        (tmp_path / f"{name}.{ending}").write_bytes(content)
        refused(tmp_path / f"{name}.{ending}", f"cannot be read as .{ending}")
        assert read_header(tmp_path / f"{name}.{ending}") is None or name == "cut"
    (tmp_path / f"empty.{ending}").write_bytes(b"")
    refused(tmp_path / f"empty.{ending}", "is empty (0 bytes)")


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "mgz", "nrrd", "hdr"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"/annex/objects/MD5E-s9--ab.nii.gz\n", "git annex get"),
        (b"../../.git/annex/objects/Zx/1/MD5E-s9--ab/MD5E-s9--ab.nii.gz", "git annex get"),
        (b"<!DOCTYPE html>\n<html>Please log in", "the download failed"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "the download failed"),
        (b"PK\x03\x04" + bytes(90), "is packed, and not by gzip. Unpack it"),
        (b"\xfd7zXZ\x00" + bytes(90), "is packed, and not by gzip. Unpack it"),
        (b"", "is empty (0 bytes)"),
    ],
)
def test_what_was_not_fetched_is_named_with_the_remedy(ending, content, said, tmp_path):
    path = tmp_path / f"P1-t1n.{ending}"
    path.write_bytes(content)
    (tmp_path / "P1-t1n.img").write_bytes(bytes(90))
    refused(path, said)


@pytest.mark.parametrize("ending", ["nii.gz", "mgz", "nrrd", "hdr"])
def test_a_link_to_nothing_is_named(ending, tmp_path):
    path = tmp_path / f"P1-t1n.{ending}"
    path.symlink_to(tmp_path / ".git" / "annex" / "objects" / "ab")
    if ending == "hdr":
        (tmp_path / "P1-t1n.img").write_bytes(bytes(90))
    with pytest.raises(VolumeError, match="is a link to a file that is not there"):
        content_sha256(path)
    refused(path, "is a link to a file that is not there. Fetch that (datalad get,")


def test_prepare_reads_them_and_sees_that_the_other_half_changed(tmp_path):
    for modality in ("t1n", "t2w"):
        path = write(tmp_path / "in" / "P1" / f"P1-{modality}.hdr", make_head(modality), np.diag([6.0, 6.0, 7.0, 1.0]))
    settings = PrepareSettings(split=Split(1, 0, 0), workers=1)
    prepare(tmp_path / "in", tmp_path / "set", settings)
    made = tmp_path / "set" / "cases" / "P1" / "case.json"
    before = json.loads(made.read_text())
    assert set(before["inputs"]) == {"P1-t1n.hdr", "P1-t2w.hdr"}
    write(path, make_head("t2w", seed=2), np.diag([6.0, 6.0, 7.0, 1.0]))
    prepare(tmp_path / "in", tmp_path / "set", settings)
    assert json.loads(made.read_text())["inputs"]["P1-t2w.hdr"] != before["inputs"]["P1-t2w.hdr"]


def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nrrd", numbered(), np.eye(4))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    refused(path, ".nrrd needs SimpleITK. Install it with: pip install 'crossmr[formats]'")
    assert read_header(path) is None


def test_images_of_nibabel_in_memory():
    for kind in (nib.MGHImage, nib.Nifti1Pair, nib.Spm99AnalyzeImage):
        where = AFFINES["oblique"] if kind is not nib.Spm99AnalyzeImage else np.diag([-2.0, 2, 2, 1])
        volume = read_volume(kind(numbered(), where))
        assert np.allclose(volume.image.affine, where, atol=1e-5)
        assert volume.data.max() == numbered().max()


def test_a_mark_outlives_conversion(tmp_path):
    nib.save(image(make_head("t1c"), description="SYNTHETIC t1c by crossmr"), tmp_path / "a.nii.gz")
    for ending in ("mha", "nrrd"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"a.{ending}"))
        assert is_synthetic(tmp_path / f"a.{ending}")
        assert read_volume(tmp_path / f"a.{ending}").synthetic


def test_names():
    for name in ("T1.NRRD", "t1.mgz", "t1.mgh.gz", "T1.hdr", "T1.hdr.gz", "T1.nii", "T1.NII.GZ", "a.b.mha"):
        assert is_volume(name)
    for name in ("T1.img", "T1.raw", "T1.nii.gz.part", "T1.json", "mgz", "T1.mnc"):
        assert not is_volume(name)
    assert stem_of("P1.T1.mgh.gz") == "P1.T1"


@pytest.mark.parametrize("ending", ["mha", "nrrd", "mgz", "hdr"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_by_the_same_rules(layout, ending):
    names = LAYOUTS[layout][0].split()

    def read(ending):
        paths = [Path("/c") / name.replace(".nii.gz", f".{ending}") for name in names]
        return [
            (study.case, study.patient, {m: [stem_of(str(p)) for p in of] for m, of in study.candidates.items()})
            for study in recognise(paths, root=Path("/c"))
        ]

    assert read(ending) == read("nii.gz")


def mixed(folder, case="P1"):
    """A study of a T1 of FreeSurfer's and a T2 of NRRD, and the same as NIfTI in another folder."""
    write_study(folder / "nifti", case, ("t1n", "t2w"))
    where = np.diag([6.0, 6.0, 7.0, 1.0])
    write(folder / "mixed" / case / f"{case}-t1n.mgz", make_head("t1n"), where)
    write(folder / "mixed" / case / f"{case}-t2w.nrrd", make_head("t2w"), where)
    return folder / "mixed", folder / "nifti"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model(save_untrained(tmp_path_factory.mktemp("model")))


SETTINGS = InferenceSettings(ddim_steps=2, device="cpu", precision="float32")


def test_formats_may_be_mixed_in_a_study_and_change_nothing(model, tmp_path):
    folder, nifti = mixed(tmp_path)
    summary = complete_cohort(folder, tmp_path / "out", model, SETTINGS)
    assert summary.completed == {"P1": ["t1c", "t2f"]}
    complete_cohort(nifti, tmp_path / "expected", model, SETTINGS)
    for name in ("P1-t1c_synthetic.nii.gz", "P1-t2f_synthetic.nii.gz"):
        made, expected = (nib.load(tmp_path / place / "P1" / name) for place in ("out", "expected"))
        assert np.array_equal(np.asarray(made.dataobj), np.asarray(expected.dataobj))
        assert np.allclose(made.affine, expected.affine)
    manifest = json.loads((tmp_path / "out" / "P1" / "manifest.json").read_text())
    assert manifest["inputs"]["t1n"]["file"] == "P1-t1n.mgz"
    assert complete_cohort(folder, tmp_path / "out", model, SETTINGS).skipped == ["P1"]


def test_files_in_memory_and_folders_alike(model, tmp_path):
    folder, _ = mixed(tmp_path)
    one = complete(folder, model, SETTINGS)
    other = complete(
        {"T1": folder / "P1" / "P1-t1n.mgz", "T2": folder / "P1" / "P1-t2w.nrrd"}, model, SETTINGS, case="P1"
    )
    for modality in ("t1c", "t2f"):
        assert np.array_equal(np.asarray(one.images[modality].dataobj), np.asarray(other.images[modality].dataobj))


def test_nifti_goes_before_other_formats_of_the_same_scan(tmp_path):
    write_study(tmp_path, "P1", ("t1n", "t2w"), lesion=True)
    for kind, data in (("t1n", make_head("t1n")), ("seg", np.zeros(SHAPE, np.uint8))):
        write(tmp_path / "P1" / f"P1-{kind}.mha", data, np.eye(4))
    (study,) = find_studies(tmp_path)
    assert [path.name for path in study.images().values()] == ["P1-t1n.nii.gz", "P1-t2w.nii.gz"]
    assert study.label().name == "P1-seg.nii.gz"
    assert {path.name for path in study.passed_over} == {"P1-t1n.mha", "P1-seg.mha"}


def test_a_segmentation_of_slicer(tmp_path):
    write_study(tmp_path, "P1", ("t1n", "t2w"))
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:16, 14:18, 10:13] = 1
    write(tmp_path / "P1" / "P1.seg.nrrd", labels, np.diag([6.0, 6.0, 7.0, 1.0]))
    (study,) = find_studies(tmp_path)
    loaded = load_study(study)
    assert np.array_equal(loaded.labels, labels.T)
    assert np.array_equal(read_labels(study.label(), loaded.reference), labels.T)


def test_a_remark_is_in_the_notes_and_what_is_broken_stops_its_study_alone(model, tmp_path):
    cohort = tmp_path / "in"
    write_study(cohort, "Ann", ("t1n", "t2w"))
    for case in ("Bob", "Cem"):
        for modality in ("t1n", "t2w"):
            (cohort / case).mkdir(exist_ok=True)
            made = nib.AnalyzeImage(make_head(modality), np.diag([-6.0, 6, 7, 1]))
            nib.save(made, cohort / case / f"{case}-{modality}.img")
    os.truncate(cohort / "Cem" / "Cem-t2w.img", 99)
    summary = complete_cohort(cohort, tmp_path / "out", model, SETTINGS)
    assert set(summary.completed) == {"Ann", "Bob"}
    assert "Cem-t2w.hdr" in summary.failed["Cem"]
    assert "T1 is Analyze, whose header does not say which side is left" in " ".join(summary.notes["Bob"])
    assert np.array_equal(
        np.isfinite(voxels(tmp_path / "out" / "Bob" / "Bob-t1c_synthetic.nii.gz")), np.ones(SHAPE, bool)
    )


def test_grids_of_other_formats_are_compared(tmp_path):
    folder, _ = mixed(tmp_path)
    write(folder / "P1" / "P1-t2w.nrrd", make_head("t2w"), np.diag([6.0, 6.0, 7.5, 1.0]))
    (study,) = find_studies(folder)
    with pytest.raises(StudyError, match=r"P1: t2w is 28×32×24 at 6×6×7.5 mm, but t1n is 28×32×24 at 6×6×7 mm"):
        load_study(study)


def test_gzip_of_a_pair_is_unpacked(tmp_path):
    path = write(tmp_path / "a.img.gz", numbered(), AFFINES["LPS"])
    packed = bytearray(path.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    refused(tmp_path / "a.hdr.gz", "gzip data is truncated or damaged")
    path.write_bytes(gzip.compress(bytes(9)))
    refused(tmp_path / "a.hdr.gz", "is truncated: 9 bytes once unpacked")


def test_a_study_that_is_an_archive_is_said(tmp_path):
    for case in ("Ann", "Bob"):
        write_study(tmp_path / "in", case, ("t1n", "t2w"))
    (tmp_path / "in" / "Cem").mkdir()
    for name in ("Cem.zip", "Cem-t1n.nii.gz.part", "Cem-t1n.json"):
        (tmp_path / "in" / "Cem" / name).write_bytes(b"PK")
    said = []
    display = SimpleNamespace(say=said.append)
    assert len(find_inputs([tmp_path / "in"], display=display).studies) == 2
    assert [line.rsplit("/", 1)[1] for line in said] == [
        "Cem-t1n.nii.gz.part belongs to no study that was found: it is a download that did not end; download it again.",
        "Cem.zip belongs to no study that was found: it is an archive, which is not opened; unpack it.",
    ]
    with pytest.raises(NamingError, match=r"3 other files; unpack archives such as Cem\.zip"):
        find_studies(tmp_path / "in" / "Cem")
