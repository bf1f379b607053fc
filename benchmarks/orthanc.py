"""A hospital's loop with real studies: Orthanc receives them by storescu, the watcher of packaging/hospital hands them
to crossmr-mercure, and what is derived goes back by storescu and is found in the same study.

Four studies are sent at once: one that lacks FLAIR; one that lacks T1ce and T2; one with a skull, whose verdict is
whatever it is; and one whose T2 is broken, its pixel data cut off. Meanwhile the watcher is killed, and Orthanc is
restarted. Then the first study is sent a second time, and once more after its mark was lost, which is a retry; and the
T2 of the second, which was synthetic, arrives.

python benchmarks/orthanc.py ../shared/data -o runs/orthanc

It needs Orthanc and dcmtk, and dciodvfy, which judges the derived images. No other Orthanc is touched.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scans import unpacked

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import dicoms
import pydicom
from test_orthanc import Archive, eventually, read, waiting, watcher, watching

LACKING = {"BraTS-GLI-00027-000": ("t2f",), "BraTS2021_01480": ("t1c", "t2w")}
BROKEN, SKULL = "BraTS-SSA-00010-000", "TCGA-DU-5851"
MARK = watcher.MARK
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyID", "AccessionNumber", "FrameOfReferenceUID")
GEOMETRY = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")


def write_dicom(scans: Path, folder: Path, case: str, number: int, lacking: tuple[str, ...]) -> None:
    """The acquired contrasts of a study as DICOM of its own patient, in whole numbers."""
    for index, modality in enumerate(m for m in ("t1n", "t1c", "t2w", "t2f") if m not in lacking):
        path = scans / case / f"{case}-{modality}.nii.gz"
        if not path.exists():
            continue
        image = nib.as_closest_canonical(nib.load(path))
        voxels = np.clip(np.rint(np.asarray(image.dataobj, np.float64)), 0, 65535).astype(int)
        identity = {"number": 2 + index, "patient": f"MRN-{number:04d}", "description": modality}
        dicoms.write_series(folder / modality, voxels, image.affine, modality, **identity)


def shorten(folder: Path) -> None:
    """Cut half of the pixel data off every image, as a broken export does; the tags stay whole."""
    for path in folder.iterdir():
        image = pydicom.dcmread(path)
        image.PixelData = image.PixelData[: len(image.PixelData) // 4 * 2]
        image.save_as(path)


def images(archive: Archive, series: dict[str, Any]) -> list[pydicom.Dataset]:
    """All images of a series, in the order of their positions."""
    alone = ({"Instances": [instance]} for instance in series["Instances"])
    return sorted(map(archive.image, alone), key=lambda image: float(image.ImagePositionPatient[2]))


def checks(archive: Archive, scan: dict[str, Any], derived: dict[str, Any], place: Path) -> Iterator[tuple[str, bool]]:
    """What is checked of one derived series against an acquired one of its study."""
    acquired, ours = images(archive, scan), images(archive, derived)
    first = acquired[0]
    yield "patient", all(image[key].value == first[key].value for image in ours for key in PATIENT)
    yield "study", all(image[key].value == first[key].value for image in ours for key in STUDY)
    same = all(image[key].value == first[key].value for image in ours for key in GEOMETRY)
    at, wanted = ([[float(v) for v in image.ImagePositionPatient] for image in stack] for stack in (ours, acquired))
    yield "geometry", same and len(at) == len(wanted) and bool(np.allclose(at, wanted, atol=1e-3))
    labels = [(tuple(image.ImageType[:2]), image.SeriesDescription[:10]) for image in ours]
    yield "label", set(labels) == {(("DERIVED", "SECONDARY"), "SYNTHETIC ")}
    place.mkdir(parents=True, exist_ok=True)
    said = ""
    for index in (0, len(ours) // 2, len(ours) - 1):
        ours[index].save_as(place / "image.dcm")
        said += subprocess.run(["dciodvfy", place / "image.dcm"], capture_output=True, text=True).stderr
    yield "dciodvfy", "Error" not in said
    uid = str(first.StudyInstanceUID)
    query = ["findscu", "-v", "-S", "-aec", "ORTHANC", "127.0.0.1", str(archive.dicom)]
    query += ["-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={uid}", "-k", "SeriesInstanceUID"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=60)
    yield "C-FIND", derived["MainDicomTags"]["SeriesInstanceUID"] in found.stdout + found.stderr


def run(archive: Archive, sent: dict[str, Path], extra: Path, out: Path) -> dict[str, Any]:
    """The whole loop; returns what was seen on the way."""
    state, log = out / "state", out / "watcher.log"
    seen: dict[str, Any] = {}
    start = time.monotonic()
    archive.send(*sent.values())
    with watching(archive, state, {}, log):
        eventually(lambda: list(state.glob("work/in/task.json")), 300)
    seen["left by a kill"] = len(list(state.glob("work/in/*.dcm")))
    with watching(archive, state, {}, log):
        eventually(lambda: "series sent" in log.read_text(), 3600)
        archive.stop()
        time.sleep(3)
        archive.start()
        eventually(lambda: not waiting(state) and quiet(archive, state), 7200)
        seen["seconds"] = round(time.monotonic() - start)
        seen["series"] = {patient: len(of) for patient, of in archive.series().items()}
        archive.send(next(iter(sent.values())))
        eventually(lambda: not waiting(state) and quiet(archive, state), 600)
        seen["after the first was sent again"] = {patient: len(of) for patient, of in archive.series().items()}
        forget(archive)
        archive.send(next(iter(sent.values())))
        eventually(lambda: log.read_text().count("series sent") > len(sent) - 1, 1800)
        eventually(lambda: not waiting(state) and quiet(archive, state), 600)
        seen["after its mark was lost"] = {patient: len(of) for patient, of in archive.series().items()}
        archive.send(extra)
        eventually(lambda: any("was handled again" in note.read_text() for note in (state / "notes").iterdir()), 1800)
        eventually(lambda: quiet(archive, state), 600)
    seen["folders left"] = (state / "work").exists()
    seen["notes"] = {path.stem: path.read_text().splitlines()[2:] for path in (state / "notes").iterdir()}
    seen["state"] = read(state)
    return seen


def forget(archive: Archive) -> None:
    """Lose the mark of the first patient's study, as if the watcher had been killed after it sent the series."""
    (study,) = (s for s in archive.get("/studies") if is_of(archive.get(f"/studies/{s}"), "MRN-0001"))
    request = urllib.request.Request(f"{archive.url}/studies/{study}/metadata/{MARK}", method="DELETE")
    urllib.request.urlopen(request, timeout=10).close()


def is_of(study: dict[str, Any], patient: str) -> bool:
    """Whether a study is a patient's."""
    return bool(study["PatientMainDicomTags"]["PatientID"] == patient)


def quiet(archive: Archive, state: Path) -> bool:
    """Whether nothing has changed in Orthanc for ten seconds that the watcher has not seen."""
    before = archive.get("/changes?last")["Last"]
    time.sleep(10)
    studies = [archive.get(f"/studies/{study}") for study in archive.get("/studies")]
    return bool(before == archive.get("/changes?last")["Last"] == read(state)["since"]) and all(
        study["IsStable"] for study in studies
    )


def main() -> None:
    """Write the studies, run the loop and print what was checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    out = given.out.resolve()
    shutil.rmtree(out / "orthanc", ignore_errors=True)
    shutil.rmtree(out / "state", ignore_errors=True)
    (out / "orthanc").mkdir(parents=True)
    (out / "watcher.log").unlink(missing_ok=True)
    scans = unpacked(given.data, out / "scans", (*LACKING, BROKEN))
    sent: dict[str, Path] = {}
    for number, (case, lacking) in enumerate({**LACKING, BROKEN: ("t2f",), SKULL: ()}.items(), 1):
        sent[case] = out / "dicom" / case
        shutil.rmtree(sent[case], ignore_errors=True)
        write_dicom(given.data / "lgg" if case == SKULL else scans, sent[case], case, number, lacking)
    shorten(sent[BROKEN] / "t2w")
    later = out / "dicom" / "later"
    shutil.rmtree(later, ignore_errors=True)
    write_dicom(scans, later, "BraTS2021_01480", 2, ("t1n", "t1c", "t2f"))
    for path in later.rglob("*.dcm"):
        image = pydicom.dcmread(path)
        image.SeriesNumber = 9
        image.SeriesInstanceUID = dicoms.uid(image.SeriesInstanceUID, "later")
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = dicoms.uid(image.SOPInstanceUID, "later")
        image.save_as(path)
    archive = Archive(out / "orthanc", stable=5)
    try:
        seen = run(archive, sent, later, out)
        table(archive, sent, out, seen)
    finally:
        archive.stop()
    (out / "orthanc.json").write_text(json.dumps(seen, indent=2))


def table(archive: Archive, sent: dict[str, Path], out: Path, seen: dict[str, Any]) -> None:
    """Print, for every derived series, what was checked; then what happened to the studies."""
    seen["checks"] = []
    print(
        "| study | series | images | "
        + " | ".join(("patient", "study", "geometry", "label", "dciodvfy", "C-FIND"))
        + " |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for number, case in enumerate(sent, 1):
        of = archive.series()[f"MRN-{number:04d}"]
        scan = next(one for one in of if one["MainDicomTags"]["Manufacturer"] == "ACME")
        for derived in (one for one in of if one["MainDicomTags"]["Manufacturer"] == "crossmr"):
            results = dict(checks(archive, scan, derived, out / "judged"))
            seen["checks"].append({"study": case, **results})
            title = derived["MainDicomTags"]["SeriesDescription"]
            marks = " | ".join("yes" if good else "NO" for good in results.values())
            print(f"| {case} | {title} | {len(derived['Instances'])} | {marks} |")
    log = (out / "watcher.log").read_text()
    people = [tag for tag in ("Doe", "Jane", "MRN-", "A123", "19700101", "2.25.") if tag in log]
    print()
    for name in (
        "seconds",
        "left by a kill",
        "series",
        "after the first was sent again",
        "after its mark was lost",
        "folders left",
        "notes",
    ):
        print(f"{name}: {seen[name]}")
    print(f"patient data in the log: {people or 'none'}")
    print(log)


if __name__ == "__main__":
    main()
