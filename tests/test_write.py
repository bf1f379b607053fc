"""DICOM out: a derived series that validators, archives and converters take, in the place of the scan it continues."""

import os
import shutil
import stat
import subprocess
import time as clock
from datetime import UTC, datetime
from pathlib import Path

import dcm2niix
import dicoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import judge, save_untrained, tree
from dicoms import OBLIQUE, SAGITTAL, head, write
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from crossmr.cli import app
from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.study import complete
from crossmr.data.volume import as_dicom_slices, read_volume, same_grid
from crossmr.dicom.convert import convert
from crossmr.dicom.series import find_series
from crossmr.dicom.write import STEPS, DerivedSeries, choose_steps, write_derived
from crossmr.errors import OutputError, VolumeError
from crossmr.files import read_json
from crossmr.networks.inference import InferenceSettings
from crossmr.output.viewer import view_case
from crossmr.picture import window

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BRATS = Path(__file__).parents[2] / "shared" / "data" / "brats" / "BraTS-GLI-00000-000"


def derived(scans, **changes):
    """A series of FLAIR that was synthesised from all that was converted."""
    fields = {"modality": "t2f", "description": "Synthetic.", "settings": "", "created": CREATED}
    return DerivedSeries(like=scans.series["t1n"], sources=scans.series, **fields | changes)


def derive(tmp_path, *, habit="plain", affine=OBLIQUE, settings="seed 0", **others):
    """A series, what it was converted to, and a derived series of random voxels on its grid."""
    dicoms.write_series(tmp_path / "in", head(), affine, habit=habit, **others)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    grid = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz")
    array = np.random.default_rng(0).random(grid.data.shape, dtype=np.float32)
    folder = write_derived(tmp_path / "series", array, grid, derived(scans, settings=settings))
    return array, grid, [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("affine", [OBLIQUE, SAGITTAL], ids=["oblique", "sagittal"])
@pytest.mark.parametrize("habit", ["plain", "implicit, no suffix, shuffled", "enhanced"])
def test_it_lies_where_the_scan_lies(habit, affine, tmp_path):
    array, grid, images = derive(tmp_path, habit=habit, affine=affine)
    assert len(images) == array.shape[0 if affine is OBLIQUE else 2]
    subprocess.run(
        [dcm2niix.bin, "-x", "i", "-z", "n", "-f", "v", "-o", tmp_path, tmp_path / "series"],
        check=True,
        capture_output=True,
    )
    back = read_volume(tmp_path / "v.nii")
    assert same_grid(back, grid)
    np.testing.assert_allclose(back.data / STEPS, array, atol=0.5 / STEPS + 1e-7)
    scan = pydicom.dcmread(next((tmp_path / "in").iterdir()))
    if habit != "enhanced":
        assert np.allclose(scan.ImageOrientationPatient, images[0].ImageOrientationPatient, atol=1e-5)
        first = [
            sorted(list(i.ImagePositionPatient) for i in map(pydicom.dcmread, (tmp_path / n).iterdir()))
            for n in ("in", "series")
        ]
        np.testing.assert_allclose(*first, atol=1e-4)
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
        assert images[0][keyword].value == scan[keyword].value
    assert images[0].SeriesInstanceUID != scan.SeriesInstanceUID


@pytest.mark.parametrize("habit", ["plain", "enhanced", "thickness and numbers missing"])
def test_validators_accept_it(habit, tmp_path):
    validator, reader = judge("dicom3tools", "dciodvfy"), judge("dcmtk", "dcmftest")
    array, grid, _ = derive(tmp_path, habit=habit)
    (scans,) = convert(tmp_path / "in", tmp_path / "again")
    write_derived(tmp_path / "signed", array - 0.5, grid, derived(scans, steps=1000.0))
    for path in sorted(path for name in ("series", "signed") for path in (tmp_path / name).iterdir())[::6]:
        for options in ([], ["-new"]):
            result = subprocess.run([validator, *options, path], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            assert "Error" not in result.stdout + result.stderr
            warnings = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Warning")]
            assert all("DICOMDIR" in line and "missing" in habit for line in warnings), warnings
        assert subprocess.run([reader, path], capture_output=True, text=True).stdout.startswith("yes")


def test_nobody_can_take_it_for_a_scan(tmp_path):
    _, _, images = derive(tmp_path)
    for image in images:
        assert image.SeriesDescription == "SYNTHETIC FLAIR (crossmr)"
        assert list(image.ImageType) == ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC", "CROSSMR"]
        assert image.DerivationDescription == "Synthetic."
        assert image.ContributingEquipmentSequence[0].Manufacturer == "crossmr"
        assert image.ScanningSequence == "RM"
    shown = {(float(image.WindowCenter), float(image.WindowWidth)) for image in images}
    pixels = np.concatenate([image.pixel_array.ravel() for image in images]) / STEPS
    black, white = window(pixels)
    assert len(shown) == 1
    assert shown.pop() == pytest.approx((STEPS * (black + white) / 2, STEPS * (white - black)), rel=1e-3)
    assert {image.SeriesInstanceUID for image in images} == {images[0].SeriesInstanceUID}
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    (series,) = find_series(tmp_path / "series")
    assert (series.modality, series.why) == (None, "itself synthetic")


@pytest.mark.parametrize(
    ("tags", "date", "time"), [({"TimezoneOffsetFromUTC": "-0500"}, "20260101", "220405"), ({}, "20260102", "123405")]
)
def test_dates_and_times_are_of_the_scans_timezone_or_local(tags, date, time, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "XYZ-09:30")  # UTC+09:30 in the way of POSIX
    clock.tzset()
    _, _, images = derive(tmp_path, **tags)
    monkeypatch.undo()
    clock.tzset()
    for image in images:
        assert image.get("TimezoneOffsetFromUTC") == tags.get("TimezoneOffsetFromUTC")
        for of in ("Series", "Content", "InstanceCreation"):
            assert (image[f"{of}Date"].value, image[f"{of}Time"].value) == (date, time)
        made = image.ContributingEquipmentSequence[0].ContributionDateTime
        assert made == f"{date}{time}{tags.get('TimezoneOffsetFromUTC', '+0930')}"


def test_the_umask_decides_who_may_read_it(tmp_path):
    before = os.umask(0o027)
    try:
        derive(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "series").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "series").iterdir()} == {0o640}


def test_each_slice_names_the_image_it_was_made_of(tmp_path):
    _, _, images = derive(tmp_path)
    scans = {s.SOPInstanceUID: s for s in (pydicom.dcmread(p) for p in (tmp_path / "in").iterdir())}
    for image in images:
        (source,) = image.SourceImageSequence
        assert np.allclose(
            scans[source.ReferencedSOPInstanceUID].ImagePositionPatient, image.ImagePositionPatient, atol=1e-3
        )


def test_removed_uids_are_made_up(tmp_path):
    habit = dicoms.Habit(missing=("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "StudyDate"))
    _, _, images = derive(tmp_path, habit=habit)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert len({image[keyword].value for image in images}) == 1
        assert images[0][keyword].value.startswith("2.25.")


@pytest.mark.parametrize(
    "kept",
    [
        ("SeriesDescription",),
        ("ImageType",),
        ("ContributingEquipmentSequence",),
        ("DerivationDescription",),
        ("SeriesDescription", "ImageType", "DerivationDescription"),
    ],
)
def test_what_was_derived_is_known_again_after_de_identification(kept, tmp_path):
    """Nothing but one tag, or a few, still says what it is; the description begins with another word."""
    array, grid, _ = derive(tmp_path, description="AX T1")
    (scans,) = convert(tmp_path / "in", tmp_path / "again")
    told = derived(scans, modality="t1n", description="Synthetic T1 by crossmr 1.0 from T2.")
    folder = write_derived(tmp_path / "shared" / "series", array, grid, told)

    def de_identify(image, _):
        image.Manufacturer = image.ManufacturerModelName = image.SoftwareVersions = ""
        changed = {"SeriesDescription": f"ANON_{image.SeriesDescription}", "ImageType": [*image.ImageType]}
        if "ImageType" not in kept:
            changed["ImageType"] = ["DERIVED", "SECONDARY", "OTHER"]
        if "SeriesDescription" not in kept:
            changed["SeriesDescription"] = "AX T1"
        for keyword, value in changed.items():
            setattr(image, keyword, value)
        for keyword in {"ContributingEquipmentSequence", "DerivationDescription"} - {*kept}:
            delattr(image, keyword)
        if "ContributingEquipmentSequence" in kept:
            (equipment,) = image.ContributingEquipmentSequence
            equipment.Manufacturer = equipment.ManufacturerModelName = ""

    dicoms.edited(folder.iterdir(), de_identify)
    (series,) = find_series(tmp_path / "shared")
    assert (series.modality, series.why, series.reason) == (None, "itself synthetic", "decided")


def test_patients_without_uids_share_no_frame_of_reference(tmp_path):
    habit = dicoms.Habit(missing=("StudyInstanceUID", "FrameOfReferenceUID"))
    frames = {derive(tmp_path / p, habit=habit, patient=p)[2][0].FrameOfReferenceUID for p in ("MRN-1", "MRN-2")}
    assert len(frames) == 2


@pytest.mark.parametrize("habit", ["plain", "implicit, no suffix, shuffled", "big-endian"])
@pytest.mark.parametrize("charset", ["ISO_IR 192", None])
def test_a_name_in_other_letters_than_its_tag_says_is_copied_byte_by_byte(habit, charset, tmp_path):
    tags = {} if charset is None else {"SpecificCharacterSet": charset}
    paths = dicoms.write_series(tmp_path / "in", head(), OBLIQUE, habit=habit, **tags)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"Doe^Jane", b"D\xf6e^Jane"))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    grid = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz")
    folder = write_derived(tmp_path / "series", grid.data * 0, grid, derived(scans))
    for path in folder.iterdir():
        assert b"D\xf6e^Jane" in path.read_bytes()
        assert pydicom.dcmread(path).get("SpecificCharacterSet") == charset


def test_what_is_no_date_time_age_or_code_is_left_out(tmp_path):
    paths = dicoms.write_series(tmp_path / "in", head(), OBLIQUE, PatientAge="054Y", PatientWeight="72.5")
    broken = {"PatientBirthDate": "1970-01-01", "StudyTime": "10:15", "PatientSex": "Female", "PatientAge": "54 years"}

    def damage(image, _):
        del image.PatientPosition
        for keyword, value in broken.items():
            setattr(image, keyword, value)

    with pydicom.config.disable_value_validation():
        dicoms.edited(paths, damage)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"72.5", b"72,5"))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    grid = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz")
    folder = write_derived(tmp_path / "series", grid.data * 0, grid, derived(scans))
    image = pydicom.dcmread(folder / "0001.dcm")
    for keyword in ("PatientBirthDate", "StudyTime", "PatientSex", "PatientPosition"):
        assert image[keyword].value in ("", None)
    assert "PatientAge" not in image
    assert "PatientWeight" not in image
    assert (image.PatientID, image.StudyDate) == ("MRN-0042", "20240131")


def test_the_same_synthesis_has_the_same_uids(tmp_path):
    *_, one = derive(tmp_path / "a")
    *_, same = derive(tmp_path / "b")
    *_, other = derive(tmp_path / "c", settings="seed 1")
    assert [i.SOPInstanceUID for i in one] == [i.SOPInstanceUID for i in same]
    assert not {i.SOPInstanceUID for i in one} & {i.SOPInstanceUID for i in other}


def test_foreign_letters_in_a_name_survive(tmp_path):
    for path in dicoms.write_series(tmp_path / "in", head(), OBLIQUE):
        image = pydicom.dcmread(path)
        image.SpecificCharacterSet, image.PatientName = "ISO_IR 192", "Müller^Zoë"
        image.save_as(path)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    grid = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz")
    series = derived(scans)
    folder = write_derived(tmp_path / "series", grid.data * 0, grid, series)
    assert pydicom.dcmread(folder / "0001.dcm").PatientName == "Müller^Zoë"
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(OutputError, match="blocked is not crossmr"):
        write_derived(tmp_path / "blocked" / "s", grid.data, grid, series)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    with pytest.raises(VolumeError, match="series 1: its DICOM tags can no longer be read"):
        write_derived(tmp_path / "series", grid.data, grid, series)
    assert len(list(folder.iterdir())) == grid.data.shape[0]


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """A study of DICOM and the same of NIfTI, completed."""
    folder = tmp_path_factory.mktemp("dicom")
    model = save_untrained(folder / "model", seed=3)
    write(folder / "in" / "one", ("t1n", "t2w"))
    write(folder / "in" / "other", ("t1c",), patient="MRN-1")
    result = complete_cohort(
        folder / "in", folder / "out", model, InferenceSettings(samples=2, guidance="unconditional")
    )
    return folder, model, result


def test_a_folder_of_dicom_is_completed_as_its_nifti_is(completed):
    folder, model, result = completed
    ((case, targets),) = result.completed.items()
    assert targets == ["t1c", "t2f"]
    ((_, reasons),) = result.not_filled.items()
    assert reasons["t2f"] == "the model needs t1n, t2w, and t1n, t2w is missing"
    manifest = read_json(folder / "out" / case / "manifest.json")
    assert manifest["series"]["taken"]["t1n"]["series"] == 2
    images = {m: nib.Nifti1Image(head(m).astype(np.float32), OBLIQUE) for m in ("t1n", "t2w")}
    direct = complete(images, model, InferenceSettings(samples=2, guidance="unconditional"), case=case)
    for modality in targets:
        entry = manifest["synthetic"][modality]
        ours = read_volume(folder / "out" / case / entry["file"])
        theirs = read_volume(direct.images[modality])
        assert same_grid(ours, theirs)
        np.testing.assert_allclose(ours.data, theirs.data, atol=1e-4)
        derived = [pydicom.dcmread(p) for p in sorted((folder / "out" / case / entry["dicom"]).iterdir())]
        assert "MRN-0042" in {image.PatientID for image in derived}
        assert ("contrast enhancement" in derived[0].DerivationDescription.lower()) == (modality == "t1c")
        assert (folder / "out" / case / f"{case}-{modality}_syntheticstd_dicom" / "0001.dcm").exists()


def test_nothing_of_another_s_is_replaced(completed, tmp_path):
    """Neither in a series nor among the scans; an image of a scanner in a series of ours is none of ours."""
    folder, model, result = completed
    out, again = shutil.copytree(folder / "out", tmp_path / "out"), CohortSettings(overwrite=True)
    (case,) = result.completed
    series, scans = out / case / f"{case}-t2f_synthetic_dicom", out / "scans" / case
    scanned = next((folder / "in").rglob("*.dcm"))
    for path, content in (
        (series / "notes.txt", b"mine"),
        (series / "0001.dcm", scanned.read_bytes()),
        (series / "9999.dcm", b"mine"),
        (scans / f"{case}-t1n.nii.gz", None),
        (scans / "series.json", b"{}"),
    ):
        ours = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        if content is None:
            path.symlink_to(scanned)
        else:
            path.write_bytes(content)
        before = tree(out)
        with pytest.raises(OutputError, match=r"(synthetic_dicom|gz|json) is not crossmr's, so .*Name another folder"):
            complete_cohort(folder / "in", out, model, InferenceSettings(), again)
        assert tree(out) == before
        path.unlink()
        if ours is not None:
            path.write_bytes(ours)
    grid = read_volume(out / case / f"{case}-t2f_synthetic.nii.gz")
    (series / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="synthetic_dicom is not crossmr's"):
        write_derived(series, grid.data, grid, derived(next(iter(convert(folder / "in", tmp_path / "new")))))


def test_again_it_is_skipped_and_overwritten_it_is_whole(completed):
    folder, model, result = completed
    settings = InferenceSettings(samples=2, guidance="unconditional")
    again = complete_cohort(folder / "in", folder / "out", model, settings)
    assert set(again.skipped) == {*result.completed, *result.not_filled}
    (case,) = result.completed
    one = InferenceSettings(samples=1, guidance="unconditional", targets=("t2f",))
    complete_cohort(folder / "in", folder / "out", model, one, CohortSettings(overwrite=True))
    left = sorted(path.name for path in (folder / "out" / case).iterdir())
    assert left == sorted([f"{case}-t2f_synthetic.nii.gz", f"{case}-t2f_synthetic_dicom", "manifest.json"])


def test_report_and_view_know_the_scans(completed):
    folder, model, _ = completed
    arguments = ["complete", folder / "in", "-o", folder / "cli", "--model", model, "--guidance", "unconditional"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    report = (folder / "cli" / "report.html").read_text()
    assert "series 2: SE, TR 550 ms, TE 12 ms" in report
    assert "MRN" not in report
    result = CliRunner().invoke(app, ["view", str(folder / "cli"), "--no-open"])
    assert result.exit_code == 0, result.output
    assert "not shown" not in result.output


def test_dicom_of_intensities_like_the_scans_says_what_the_nifti_says(completed):
    """--scale input: pixels are intensities of the scans, of volume and standard deviation, and the window fits."""
    folder, _, _ = completed
    model = save_untrained(folder / "certain", guidance="none", uncertainty=True)
    arguments = ["complete", folder / "in" / "one", "-o", folder / "like", "--model", model, "--scale", "input"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    ((case, place),) = [(path.name, path) for path in (folder / "like").iterdir() if (path / "manifest.json").exists()]
    manifest = read_json(place / "manifest.json")
    for modality, entry in manifest["synthetic"].items():
        assert entry["scale"]["like"] == {"t1c": "t1n", "t2f": "t2w"}[modality]
        scan = read_volume(folder / "like" / "scans" / case / f"{case}-{entry['scale']['like']}.nii.gz").data
        made = read_volume(place / entry["file"]).data
        inside = made != 0
        assert np.median(made[inside]) == pytest.approx(np.median(scan[inside]), rel=0.05)
        for kind in ("", "std"):
            written = read_volume(place / f"{case}-{modality}_{kind or 'synthetic'}.nii.gz").data
            series = [pydicom.dcmread(p) for p in (place / f"{case}-{modality}_synthetic{kind}_dicom").iterdir()]
            slope = float(series[0].RealWorldValueMappingSequence[0].RealWorldValueSlope)
            grid = read_volume(place / f"{case}-{modality}_synthetic.nii.gz")
            np.testing.assert_allclose(
                in_order(series) * slope, as_dicom_slices(written, grid).pixels, atol=0.51 * slope
            )
            black, white = window(written)
            assert float(series[0].WindowWidth) * slope == pytest.approx(white - black, rel=0.01)
            assert float(series[0].WindowCenter) * slope == pytest.approx((white + black) / 2, rel=0.01)


def test_one_study_is_completed_in_memory(completed):
    folder, model, _ = completed
    completed_study = complete(folder / "in" / "one", model, InferenceSettings(guidance="unconditional"))
    assert list(completed_study.images) == ["t1c", "t2f"]


@pytest.mark.skipif(not BRATS.is_dir(), reason=f"needs the real scans in {BRATS}")
def test_real_scans_take_the_same_way(tmp_path):
    habits = {"t1n": "implicit, no suffix, shuffled", "t1c": "JPEG-LS", "t2f": "enhanced"}
    scans = {m: BRATS / f"{BRATS.name}-{m}.nii.gz" for m in habits}
    for number, (modality, path) in enumerate(scans.items(), 1):
        scan = nib.load(path)
        dicoms.write_series(
            tmp_path / "in" / modality,
            np.asarray(scan.dataobj),
            scan.affine,
            modality,
            number=number,
            habit=habits[modality],
        )
    result = complete_cohort(tmp_path / "in", tmp_path / "out")
    ((case, targets),) = result.completed.items()
    assert targets == ["t2w"]
    ours = read_volume(tmp_path / "out" / case / f"{case}-t2w_synthetic.nii.gz")
    theirs = read_volume(complete(scans).images["t2w"])
    assert same_grid(ours, theirs)
    np.testing.assert_allclose(ours.data, theirs.data, atol=1e-4)
    series = tmp_path / "out" / case / f"{case}-t2w_synthetic_dicom"
    subprocess.run([dcm2niix.bin, "-x", "i", "-f", "v", "-o", tmp_path, series], check=True, capture_output=True)
    back = read_volume(tmp_path / "v.nii")
    assert same_grid(back, theirs)
    np.testing.assert_allclose(back.data / STEPS, theirs.data, atol=1e-4)


def test_series_on_other_grids_are_registered(tmp_path):
    """As a scanner leaves them: slices in another direction, thicker, and the head moved in between."""
    if not BRATS.is_dir():
        pytest.skip(f"needs the real scans in {BRATS}")
    scan = nib.load(BRATS / f"{BRATS.name}-t1n.nii.gz")
    dicoms.write_series(
        tmp_path / "in" / "1", np.asarray(scan.dataobj)[:, :, ::2], scan.affine @ np.diag([1, 1, 2, 1]), number=1
    )
    other = nib.load(BRATS / f"{BRATS.name}-t2f.nii.gz")
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", [6, -4, 5], degrees=True).as_matrix()
    turned[:3, 3] = [4, -9, 12]
    # sagittal slices of 2 mm, in a frame that the patient moved in: world → world by `turned`
    sagittal = np.array([[0, 0, 2.0, -200], [1.5, 0, 0, 20], [0, 1.5, 0, -20], [0, 0, 0, 1]])
    shape = (150, 130, 100)
    to_voxel = np.linalg.inv(other.affine) @ turned @ sagittal
    moved = affine_transform(np.asarray(other.dataobj, float), to_voxel, output_shape=shape, order=1)
    dicoms.write_series(tmp_path / "in" / "2", np.rint(moved).clip(0), sagittal, "t2f", number=2)
    result = complete_cohort(tmp_path / "in", tmp_path / "out")
    ((case, targets),) = result.completed.items()
    assert targets == ["t1c", "t2w"]
    _, notes = view_case(tmp_path / "out")
    assert notes == []  # the scans are shown, registered as they were
    note = next(note for note in result.notes[case] if "t2f was registered to t1n" in note)
    degrees = [float(number) for number in note.split("and (")[1].split(")")[0].split(",")]
    wanted = Rotation.from_matrix(turned[:3, :3]).as_rotvec(degrees=True)
    np.testing.assert_allclose(np.abs(degrees), np.abs(wanted), atol=1.0)


def in_order(images):
    """The stored integers (K, rows, columns) of a derived series."""
    return np.stack([image.pixel_array for image in sorted(images, key=lambda image: image.InstanceNumber)])


@pytest.mark.parametrize("least", [0, -3])
@pytest.mark.parametrize("times", [0.001, 1.0, 40.0, 10000.0])
def test_intensities_like_a_scan_are_stored_as_they_are_where_they_fit(tmp_path, times, least):
    """Voxel by voxel the real-world values are the intensities, negative ones, too, and 0 is 0."""
    write(tmp_path / "in", ("t1n",))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    grid = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz")
    array = (times * head("t2f").T).astype(np.float32)
    array = np.ascontiguousarray(np.resize(array, grid.data.shape))
    array[0] = least * times
    steps = choose_steps(array)
    folder = write_derived(tmp_path / "series", array, grid, derived(scans, steps=steps))
    images = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    values = images[0].RealWorldValueMappingSequence[0]
    assert (values.RealWorldValueSlope, values.RealWorldValueIntercept) == (pytest.approx(1 / steps), 0)
    largest = 32767 if least else 65535
    assert (steps == 1) == (255 <= array.max() <= largest)
    assert {image.PixelRepresentation for image in images} == {int(least < 0)}
    stored, wanted = in_order(images), as_dicom_slices(array, grid).pixels
    assert 255 <= stored.max() <= largest
    assert (values.RealWorldValueFirstValueMapped <= stored.min()) & (stored.max() <= largest)
    np.testing.assert_allclose(stored / steps, wanted, atol=0.5 / steps + 1e-6 * array.max())
    np.testing.assert_array_equal(stored[wanted == 0], 0)
