"""What the page's jobs do: recognise, let a user correct, complete, and prepare what is shown and sent."""

import json
import shutil
import subprocess
import sys

import dicoms
import nibabel as nib
import numpy as np
import pytest
from conftest import image, judge, make_head, save_untrained, write_images
from test_layout import VALIDATOR

from crossmr.app.worker import complete, recognise
from crossmr.data.naming import find_studies
from crossmr.errors import ConfigError, NamingError


@pytest.fixture
def ask(model, tmp_path):
    """Recognise, and complete, what lies in tmp_path/scans; what was told of it is in `ask.told`."""
    scans = tmp_path / "scans"
    scans.mkdir()

    def recognised(choices=None, **more):
        ask.told = []
        place = tmp_path / f"sorted-{len(list(tmp_path.iterdir()))}"
        return recognise(
            model, {"scans": str(scans), "choices": choices or {}, "sorted": str(place), **more}, ask.told.append
        )

    def completed(found, **more):
        job = {"batches": found["batches"], "out": str(tmp_path / f"out{len(more) or ''}"), **more}
        return complete(model, job, ask.told.append)

    def ask():
        return recognised()

    ask.scans, ask.out, ask.recognise, ask.complete = scans, tmp_path / "out", recognised, completed
    return ask


def contrasts(case):
    return {row["name"]: row["contrast"] for row in case["rows"]}


def save(path, modality="t1n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = image(make_head(modality, shape=(26, 28, 22)))
    nib.save(nib.Nifti1Pair(made.dataobj, made.affine) if path.suffix == ".hdr" else made, path)


def test_a_study_is_recognised_completed_and_shown(ask):
    write_images(ask.scans, "Ann", ("t1n", "t2w"))
    found = ask.recognise()
    (case,) = found["cases"]
    assert contrasts(case) == {"Ann-t1n.nii.gz": "t1n", "Ann-t2w.nii.gz": "t2w"}
    assert (case["acquired"], case["synthesise"], case["failed"]) == (["t1n", "t2w"], ["t1c", "t2f"], "")
    result = ask.complete(found)
    (case,) = result["cases"]
    assert case["verdict"] in ("use", "look", "refuse")
    assert list(case["synthetic"]) == ["t1c", "t2f"]
    assert any("not a medical device" in text for text in case["warnings"])
    assert result["failed"] == {}
    assert not result["dicom"]
    assert {path.name for path in (ask.out / "view" / "Ann").iterdir()} >= {"index.html", "0.nii.gz", "3.nii.gz"}
    assert (ask.out / "result" / "report.html").exists()
    texts = [one["text"] for one in ask.told]
    assert texts[0] == "Reading names and tags"
    assert texts.index("Reading the scans") < texts.index("Preparing the view")


def test_progress_is_that_of_the_slices(ask, monkeypatch):
    from crossmr.networks import inference

    monkeypatch.setattr(inference, "BATCH", 5)
    write_images(ask.scans, "Ann", ("t1n", "t2w"))
    ask.complete(ask.recognise())
    slices = [(one["done"], one["total"]) for one in ask.told if "done" in one]
    (total,) = {total for _, total in slices}
    assert [done for done, _ in slices] == list(range(5, total, 5))
    assert {"text": "Checking and writing"} in ask.told


def test_a_user_says_what_a_file_is(ask):
    for name, modality in (("Ann_scan1", "t1n"), ("Ann_t2w", "t2w"), ("Ann_t1n", "t2f")):
        save(ask.scans / "study" / f"{name}.nii.gz", modality)
    (before,) = ask.recognise()["cases"]
    assert contrasts(before) == {"Ann_scan1.nii.gz": "unknown", "Ann_t2w.nii.gz": "t2w", "Ann_t1n.nii.gz": "t1n"}
    choices = {"study/Ann_scan1.nii.gz": "t1n", "study/Ann_t1n.nii.gz": "t2f"}
    found = ask.recognise(choices)
    (case,) = found["cases"]
    assert contrasts(case) == {"Ann_scan1.nii.gz": "t1n", "Ann_t2w.nii.gz": "t2w", "Ann_t1n.nii.gz": "t2f"}
    assert {row["why"] for row in case["rows"] if row["key"] in choices} == {"chosen by you"}
    assert case["acquired"] == ["t1n", "t2w", "t2f"]
    assert case["synthesise"] == ["t1c"]
    (result,) = ask.complete(found)["cases"]
    assert result["case"] == "Ann"
    assert result["acquired"] == ["t1n", "t2w", "t2f"]
    manifest = json.loads((ask.out / "result" / "Ann" / "manifest.json").read_text())
    as_given = nib.load(ask.scans / "study" / "Ann_scan1.nii.gz")
    assert manifest["inputs"]["t1n"]["file"] == "Ann__t1n.nii.gz"
    made = nib.load(ask.out / "result" / "Ann" / "Ann-t1c_synthetic.nii.gz")
    np.testing.assert_array_equal(made.affine, as_given.affine)


def test_a_file_is_not_used_and_one_contrast_is_one_file(ask):
    write_images(ask.scans, "Ann", ("t1n", "t2w", "t2f"))
    (case,) = ask.recognise({"Ann/Ann-t2f.nii.gz": "unused"})["cases"]
    assert (case["acquired"], case["synthesise"]) == (["t1n", "t2w"], ["t1c", "t2f"])
    (case,) = ask.recognise({"Ann/Ann-t2f.nii.gz": "t2w"})["cases"]
    assert case["failed"] == "Ann-t2w.nii.gz and Ann-t2f.nii.gz are both T2. Choose one of them."
    (case,) = ask.recognise({f"Ann/Ann-{m}.nii.gz": "unused" for m in ("t1n", "t2w", "t2f")})["cases"]
    assert case["failed"] == "nothing of it is used"


def test_what_is_no_contrast_and_no_scan_is_refused(ask):
    with pytest.raises(NamingError, match="None of these files is a volume"):
        ask.recognise()
    write_images(ask.scans, "Ann", ("t1n", "t2w"))
    with pytest.raises(ConfigError, match="is no contrast"):
        ask.recognise({"Ann/Ann-t1n.nii.gz": "../../t1n"})


def test_what_may_be_a_contrast_stays_in_doubt_beside_a_choice(ask):
    write_images(ask.scans, "Ann", ("t1n", "t2w"))
    (ask.scans / "Ann" / "Ann-FLAIR.mif").touch()
    chosen = {"Ann/Ann-t2w.nii.gz": "t2w"}
    for choices in ({}, chosen):
        (case,) = ask.recognise(choices)["cases"]
        assert case["synthesise"] == ["t1c"]
        assert "Ann-FLAIR.mif may be it" in case["not_synthesised"]["t2f"]
        (row,) = (row for row in case["rows"] if not row["readable"])
        assert row["contrast"] == "unknown"
    (case,) = ask.recognise({row["key"]: "unused"})["cases"]
    assert case["synthesise"] == ["t1c", "t2f"]


def test_files_of_several_names_can_be_one_study(ask):
    save(ask.scans / "study" / "Ann_T1.nii.gz")
    save(ask.scans / "study" / "Anna_T2.nii.gz", "t2w")
    assert len(ask.recognise()["cases"]) == 2
    found = ask.recognise(together=True)
    (case,) = found["cases"]
    assert case["acquired"] == ["t1n", "t2w"]
    assert list(ask.complete(found)["cases"][0]["synthetic"]) == ["t1c", "t2f"]


def test_a_pair_is_corrected_with_both_of_its_files(ask):
    save(ask.scans / "study" / "Ann_a.hdr")
    save(ask.scans / "study" / "Ann_T2.nii.gz", "t2w")
    found = ask.recognise({"study/Ann_a.hdr": "t1n"})
    (case,) = found["cases"]
    assert case["acquired"] == ["t1n", "t2w"]
    assert ask.complete(found)["cases"][0]["acquired"] == ["t1n", "t2w"]


def test_one_study_fails_and_the_other_is_made(ask, cohort):
    shutil.copytree(cohort / "Ann", ask.scans / "Ann")
    shutil.copytree(cohort / "Dan", ask.scans / "Dan")  # on two grids
    result = ask.complete(ask.recognise())
    assert [case["case"] for case in result["cases"]] == ["Ann"]
    assert "Dan" in result["failed"]
    assert str(ask.scans) not in json.dumps(result)


def test_what_was_refused_is_made_if_a_user_insists(ask):
    write_images(ask.scans, "Ann", ("t1n",))
    shutil.copy(ask.scans / "Ann" / "Ann-t1n.nii.gz", ask.scans / "Ann" / "Ann-t2w.nii.gz")  # one image twice
    found = ask.recognise()
    (case,) = ask.complete(found)["cases"]
    assert (case["verdict"], case["synthetic"], sorted(case["refused"])) == ("refuse", {}, ["t1c", "t2f"])
    assert case["view"]  # of the acquired ones, to see why
    (case,) = ask.complete(found, targets=["t2f"])["cases"]
    assert list(case["synthetic"]) == ["t2f"]


def write_dicom(folder, series, **more):
    affine = np.diag([6.0, 6.0, 7.0, 1.0])
    for number, (modality, description) in enumerate(series, 1):
        voxels = np.rint(make_head(modality if modality != "?" else "t2f", shape=(26, 28, 22)))
        dicoms.write_series(
            folder / str(number), voxels, affine, modality, number=number, description=description, **more
        )


def test_series_of_dicom_are_corrected_and_come_back_as_dicom(ask):
    write_dicom(ask.scans, (("t1n", "T1"), ("t2w", "T2"), ("?", "same"), ("?", "same")))
    found = ask.recognise()
    (case,) = found["cases"]
    assert found["dicom"]
    assert [row["contrast"] for row in case["rows"]] == ["t1n", "t2w", "unknown", "unknown"]
    assert case["rows"][2]["name"] == "Series 3 · same"
    assert case["whose"].startswith("MRN-0042 · 20240131 · ")
    assert case["rows"][2]["images"] == 22
    found = ask.recognise({case["rows"][3]["key"]: "t2f", case["rows"][2]["key"]: "unused"})
    (case,) = found["cases"]
    assert (case["acquired"], case["synthesise"]) == (["t1n", "t2w", "t2f"], ["t1c"])
    result = ask.complete(found)
    assert result["dicom"]
    series = list((ask.out / "result" / case["case"]).glob("*_synthetic_dicom"))
    assert [len(list(one.iterdir())) for one in series] == [22]


def test_a_correction_is_of_one_series_whatever_the_others_are_called(ask):
    """Two echoes and two T1 share a number each, and a FLAIR of an earlier number arrives after the correction."""
    affine = np.diag([6.0, 6.0, 7.0, 1.0])

    def write(name, modality, number, **tags):
        voxels = np.rint(make_head("t1n", shape=(26, 28, 22)))
        dicoms.write_series(ask.scans / name, voxels, affine, modality, number=number, **tags)

    echoes = {"description": "pd t2", "RepetitionTime": 3000}
    for name, modality, number, tags in (
        ("pd", "t2w", 4, {"EchoTime": 15, "SeriesInstanceUID": "1.2.4.1", **echoes}),
        ("t2", "t2w", 4, {"EchoTime": 95, "SeriesInstanceUID": "1.2.4.2", **echoes}),
        ("first", "t1n", 5, {"description": "a [T1] *", "SeriesInstanceUID": "1.2.5.1"}),
        ("second", "t1n", 5, {"description": "", "SeriesInstanceUID": "1.2.5.2", "AcquisitionTime": "102000"}),
    ):
        write(name, modality, number, **tags)
    rows = ask.recognise()["cases"][0]["rows"]
    assert [row["contrast"] for row in rows] == ["pdw", "t2w", "t1n", "unknown"]
    for chosen, other in ((2, 3), (3, 2)):
        found = ask.recognise({rows[chosen]["key"]: "t1c"})
        again = found["cases"][0]["rows"]
        assert [row["key"] for row in again] == [row["key"] for row in rows]
        assert found["cases"][0]["acquired"] == ["t1n", "t1c", "t2w", "pdw"], (chosen, other)
    write("flair", "t2f", 3)
    (case,) = ask.recognise({rows[3]["key"]: "t1c"})["cases"]
    assert [(row["contrast"], row["why"]) for row in case["rows"]][-1] == ("t1c", "chosen by you")
    assert case["acquired"] == ["t1n", "t1c", "t2w", "t2f", "pdw"]


def test_the_derivative_is_valid_bids(ask):
    write_images(ask.scans, "Ann", ("t1n", "t2w"))
    write_images(ask.scans, "Bob", ("t1n", "t2w"), seed=1)
    ask.complete(ask.recognise())
    bids = ask.out / "bids"
    assert {p.name for p in bids.rglob("*.nii.gz")} >= {"sub-Ann_ce-gadolinium_desc-synthetic_T1w.nii.gz"}
    manifest = json.loads((bids / "crossmr" / "Ann" / "manifest.json").read_text())
    assert (bids / "crossmr" / "Ann" / manifest["synthetic"]["t2f"]["file"]).resolve().is_file()
    told = subprocess.run(
        [judge("bids-validator-deno", VALIDATOR), "--json", bids], capture_output=True, text=True, timeout=120
    )
    issues = json.loads(told.stdout)["issues"]["issues"]
    assert not [issue for issue in issues if issue["severity"] == "error"]


def start(model, root):
    command = [sys.executable, "-m", "crossmr.app.worker", model, "cpu", root]
    return subprocess.Popen(command, stdin=-1, stdout=-1, text=True)


def end(process):
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()


def test_the_process_speaks_lines_and_ends_with_its_input(tmp_path):
    """And deletes the folder of all pages, which a killed server leaves behind."""
    model, root = save_untrained(tmp_path / "model"), tmp_path / "root"
    write_images(root / "scans", "Ann", ("t1n", "t2w"))
    job = {"verb": "recognise", "scans": str(root / "scans"), "sorted": str(root / "sorted")}
    lines = "".join(json.dumps(one) + "\n" for one in (job, {"verb": "no such"}, {**job, "scans": str(root / "none")}))
    process = start(model, root)
    process.stdin.write(lines)
    process.stdin.flush()
    told = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert told[0] == {"text": "Reading names and tags"}
    assert told[1]["result"]["cases"][0]["case"] == "Ann"
    assert told[2] == {"error": "KeyError: 'no such'"}
    end(process)
    assert not root.exists()


def test_a_model_that_cannot_be_loaded_is_said_to_each_job(tmp_path):
    model = save_untrained(tmp_path / "model")
    (model / "synthesis.safetensors").write_bytes(b"broken")
    process = start(model, tmp_path / "root")
    for _ in range(2):
        process.stdin.write("{}\n")
        process.stdin.flush()
        assert "synthesis.safetensors" in json.loads(process.stdout.readline())["error"]
    end(process)


def test_what_was_sorted_is_read_as_it_was_sorted(ask):
    """A case whose name ends in a word of its own keeps it."""
    write_images(ask.scans, "P1_T2", ("t1n", "t2w"))
    (before,) = ask.recognise()["cases"]
    found = ask.recognise({before["rows"][0]["key"]: before["rows"][0]["contrast"]})
    (case,) = found["cases"]
    assert case["failed"] == ""
    folder, mapping = found["batches"][0]
    (study,) = find_studies(folder, mapping)
    assert study.case == before["case"]
