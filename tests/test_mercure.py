"""A module of mercure: what it reads and writes, its settings, what is held back, and that no message names anybody."""

import json
import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import dicoms
import pydicom
import pytest
from conftest import tree

from crossmr import mercure
from crossmr.errors import ConfigError
from crossmr.mercure import IN, NOTIFICATION, OUT, ROUTING, ModuleSettings, impersonal, main, read_settings

PERSONAL = ("Doe", "Jane", "MRN", "0042", "19700101", "A123", "2.25.")
"""Of the patient in dicoms.py; and the start of every UID there."""


class Task:
    """The folders that mercure makes for one run of a module, and the run."""

    def __init__(self, place: Path, model: Path, monkeypatch, capfd):
        self.incoming, self.outgoing, self.model = place / "in", place / "out", model
        self.temporary = place / "tmp"
        for folder in (self.incoming, self.outgoing, self.temporary):
            folder.mkdir()
        monkeypatch.setenv(IN, str(self.incoming))
        monkeypatch.setenv(OUT, str(self.outgoing))
        monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))
        self.capfd = capfd

    def receive(self, folder: Path) -> None:
        """What mercure does with the files that it receives."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                image = pydicom.dcmread(path, stop_before_pixels=True)
                name = f"{image.SeriesInstanceUID}#{image.SOPInstanceUID}"
                shutil.copy(path, self.incoming / f"{name}.dcm")
                (self.incoming / f"{name}.tags").write_text("{}")

    def run(self, settings=None, *, process="process"):
        """The exit code, result.json, what is sent on, and what was printed."""
        given = {"model": str(self.model), "device": "cpu"} | (settings or {})
        task = {"id": "0b5e", process: {"module_name": "crossmr", "settings": given, "retain_input_images": False}}
        (self.incoming / "task.json").write_text(json.dumps(task))
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = "".join(self.capfd.readouterr())
        assert not list(self.temporary.iterdir())
        path = self.outgoing / "result.json"
        return stopped.value.code, json.loads(path.read_text()), sorted(self.outgoing.glob("*.dcm")), printed


@pytest.fixture
def task(tmp_path, model_folder, monkeypatch, capfd):
    usual = signal.getsignal(signal.SIGTERM)
    yield Task(tmp_path, model_folder, monkeypatch, capfd)
    signal.signal(signal.SIGTERM, usual)


def cut(path: Path) -> None:
    """Leave the tags of an image, and half of its pixels."""
    path.write_bytes(path.read_bytes()[: -dicoms.SHAPE[0] * dicoms.SHAPE[1]])


def test_a_study_is_completed_into_flat_labelled_series(task, tmp_path):
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    code, result, sent, printed = task.run()
    assert code == 0
    assert (result["status"], result["studies"][0]["verdict"]) == ("sent", "use")
    assert len(sent) == 2 * dicoms.SHAPE[2]
    scan = pydicom.dcmread(next(task.incoming.glob("*.dcm")))
    for path in sent:
        image = pydicom.dcmread(path)
        assert path.name == f"{image.SeriesInstanceUID}#{image.SOPInstanceUID}.dcm"
        assert list(image.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert image.SeriesDescription.startswith("SYNTHETIC ")
        for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "FrameOfReferenceUID"):
            assert image[keyword].value == scan[keyword].value
    listed = {series["series_uid"]: series["images"] for series in result["studies"][0]["series"]}
    assert listed == dict.fromkeys({path.name.partition("#")[0] for path in sent}, dicoms.SHAPE[2])
    assert ROUTING not in result
    assert result["studies"][0]["taken"] == {
        "t1n": "series 2: SE, TR 550 ms, TE 12 ms; no contrast agent named",
        "t2w": "series 3: SE, TR 4500 ms, TE 95 ms",
    }
    assert result["studies"][0]["left_out"] == {}
    message = result[NOTIFICATION]
    assert message["text"].startswith("Sent: SYNTHETIC T1ce (crossmr), SYNTHETIC FLAIR (crossmr); verdict use.")
    assert "not a medical device" in message["text"]
    assert message["text"] == printed.strip()
    assert message["requested"] is False


def test_run_again_it_makes_the_same_images_with_the_same_uids(task, tmp_path):
    """An archive that is sent the result of a retry recognises every image of it."""
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    first = {path.name: pydicom.dcmread(path).PixelData for path in task.run()[2]}
    for path in task.outgoing.iterdir():
        path.unlink()
    assert {path.name: pydicom.dcmread(path).PixelData for path in task.run()[2]} == first


def test_a_complete_study_sends_nothing_and_its_own_series_are_no_scans(task, tmp_path):
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    sent = task.run()[2]
    for path in sent:
        shutil.move(path, task.incoming)  # the derived series were sent to mercure, too
    _, again, sent_again, _ = task.run()
    assert [path.name for path in sent_again] == [path.name for path in sent]
    assert again["studies"][0]["acquired"] == ["t1n", "t2w"]
    for path in sent_again:
        path.unlink()
    dicoms.write(tmp_path / "rest", ("t1n", "t1c", "t2w", "t2f"))
    task.receive(tmp_path / "rest")
    code, result, sent, _ = task.run()
    assert (code, result["status"], sent) == (0, "complete", [])
    assert result[ROUTING] == {"discard": True}
    assert result[NOTIFICATION] == {
        "text": f"Nothing sent: there is nothing to synthesise. {mercure.LABEL}",
        "requested": False,
    }


def test_a_refused_study_is_held_back_unless_the_settings_say_so(task, tmp_path):
    """A T1ce may be among its series, but one of its files is broken: FLAIR is synthesised, T1ce is refused."""
    dicoms.write(tmp_path / "study", ("t1n", "t2w", "t1c"))
    task.receive(tmp_path / "study")
    broken = sorted(path for path in task.incoming.glob("*.dcm") if "ContrastBolusAgent" in pydicom.dcmread(path))[3]
    broken.write_bytes(broken.read_bytes()[:300])
    code, result, sent, printed = task.run()
    assert (code, result["status"], sent) == (0, "held back", [])
    assert result[ROUTING] == {"discard": True}
    study = result["studies"][0]
    assert (study["verdict"], study["synthetic"], study["series"]) == ("refuse", ["t2f"], [])
    text = result[NOTIFICATION]["text"]
    assert text.startswith("Nothing sent: the verdict is refuse, and the setting 'send' excludes it.")
    assert "T1ce" in text
    assert result[NOTIFICATION]["requested"] is True
    assert not [word for word in PERSONAL if word in printed + json.dumps(study)]
    code, result, sent, _ = task.run({"send": "refuse"})
    assert (code, result["status"]) == (0, "sent")
    assert {pydicom.dcmread(path).SeriesDescription for path in sent} == {"SYNTHETIC FLAIR (crossmr)"}
    assert result[NOTIFICATION]["requested"] is True


def test_the_settings_choose_targets_and_scale(task, tmp_path):
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    _, result, sent, _ = task.run({"targets": ["FLAIR"], "scale": "input"})
    assert {pydicom.dcmread(path).SeriesDescription for path in sent} == {"SYNTHETIC FLAIR (crossmr)"}
    assert result["studies"][0]["synthetic"] == ["t2f"]
    assert pydicom.dcmread(sent[0]).RealWorldValueMappingSequence[0].LUTLabel == "LIKE A SCAN"


@pytest.mark.parametrize("std", [True, False])
def test_the_standard_deviation_is_a_series_that_may_be_left_out(std, task, tmp_path, monkeypatch):
    from conftest import save_untrained

    task.model = save_untrained(tmp_path / "uncertain", guidance="none", uncertainty=True, targets=("t2f",))
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    _, _, sent, _ = task.run({"std": std})
    described = {pydicom.dcmread(path).SeriesDescription for path in sent}
    assert described == {"SYNTHETIC FLAIR (crossmr)", *(["SYNTHETIC FLAIR std (crossmr)"] if std else [])}


def test_series_descriptions_are_mapped(task, tmp_path):
    dicoms.write(tmp_path / "study", ("t1n",), description="PLAIN")
    dicoms.write(tmp_path / "study" / "odd", ("t2w",), description="WEIRD", EchoTime=60, RepetitionTime=1500)
    for path in (tmp_path / "study" / "odd").rglob("*.dcm"):
        image = pydicom.dcmread(path)
        image.SeriesInstanceUID, image.SOPInstanceUID = f"{image.SeriesInstanceUID}9", f"{image.SOPInstanceUID}9"
        image.save_as(path)
    task.receive(tmp_path / "study")
    _, result, _, _ = task.run()
    assert result["status"] == "not synthesised"
    assert [*result["studies"][0]["left_out"]] == ["series 2"]
    _, result, _, _ = task.run({"map": {"T2": "WEIRD"}})
    assert (result["status"], result["studies"][0]["acquired"]) == ("sent", ["t1n", "t2w"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": ["t2f"]}, "'task.json: process.settings.target' is not a setting of ModuleSettings. Did you mean"),
        ({"targets": ["T3"]}, "T3"),
        ({"std": "perhaps"}, "process.settings.std is 'perhaps'; expected bool."),
        ({"send": "all"}, "process.settings.send is 'all'; it may be one of: use, look, refuse."),
        ({"model": "best"}, "'best' is neither a folder nor the name of a model"),
        ({"device": "abacus"}, "abacus"),
        ({"targets": ["PD"]}, "This model cannot synthesise"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_sent(settings, said, task, tmp_path):
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    code, result, sent, printed = task.run(settings)
    assert (code, result["status"], sent) == (1, "failed", [])
    assert said in result["error"]
    assert result["error"] in printed
    assert result[NOTIFICATION]["requested"] is True


def test_of_settings_that_several_modules_share_its_own_count(tmp_path):
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"process": {"settings": {"sigma": 7, "crossmr": {"targets": "t1c,t2f"}}}}))
    assert read_settings(path) == ModuleSettings(targets=("t1c", "t2f"))
    for nothing in ({}, {"process": {}}, {"process": {"settings": {}}}):
        path.write_text(json.dumps(nothing))
        assert read_settings(path) == ModuleSettings()
    path.write_text(json.dumps({"process": [{"settings": {}}]}))
    with pytest.raises(ConfigError, match="expected settings by name"):
        read_settings(path)


def test_a_broken_study_fails_without_naming_anybody(task, tmp_path):
    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    for path in task.incoming.glob("*.dcm"):
        cut(path)
    before = tree(task.incoming)
    code, result, sent, printed = task.run()
    assert (code, result["status"], sent) == (1, "failed", [])
    assert "cut off" in result["error"] or "cannot be read" in result["error"]
    assert not [word for word in PERSONAL if word in printed + json.dumps(result)]
    assert {**tree(task.incoming), "task.json": ""} == {**before, "task.json": ""}


def test_what_is_not_there_is_said(task, monkeypatch):
    code, result, _, _ = task.run()
    assert code == 1
    assert "MERCURE_IN_DIR holds no image" in result["error"]
    (task.incoming / "task.json").write_text("{")
    monkeypatch.delenv(IN)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "MERCURE_IN_DIR is ''" in json.loads((task.outgoing / "result.json").read_text())["error"]
    monkeypatch.delenv(OUT)
    with pytest.raises(SystemExit):
        main()
    assert "MERCURE_OUT_DIR is '', not a folder" in task.capfd.readouterr().err


@pytest.mark.parametrize("end", ["unforeseen", "stopped"])
def test_its_folder_is_private_and_goes_whatever_happens(end, task, tmp_path, monkeypatch):
    from crossmr.completion import cohort

    dicoms.write(tmp_path / "study", ("t1n", "t2w"))
    task.receive(tmp_path / "study")
    seen = []

    def fail(folder, *_):
        seen.append(stat.S_IMODE(folder.parent.stat().st_mode))
        seen.append(len(list(folder.rglob("*.dcm"))))
        if end == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("Doe^Jane")

    monkeypatch.setattr(cohort, "complete_cohort", fail)
    if end == "stopped":
        with pytest.raises(SystemExit) as stopped:
            main_of(task)
        assert stopped.value.code == 143
    else:
        code, result, _, printed = task.run()
        assert (code, result["error"]) == (1, "unforeseen ValueError")
        assert "Doe^Jane" not in printed.replace('raise ValueError("Doe^Jane")', "")
        assert "in fail" in printed
    assert seen == [0o700, 2 * dicoms.SHAPE[2]]
    assert not list(task.temporary.iterdir())


def main_of(task):
    (task.incoming / "task.json").write_text("{}")
    main()


def test_impersonal():
    text = "sub-1: /data/Doe^Jane/0001.dcm (1.2.840.113619.2.5.1762583153.215519) of 1.0.2 at 0.5 mm"
    assert impersonal(text) == "sub-1: 0001.dcm ((UID)) of 1.0.2 at 0.5 mm"
