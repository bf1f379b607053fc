"""packaging/hospital/orthanc_watcher.py: a real Orthanc, fed and fed back by storescu; and faults, of a false one."""

import importlib.util
import io
import json
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dicoms
import numpy as np
import pydicom
import pytest
from conftest import judge
from test_mercure import PERSONAL

SCRIPT = Path(__file__).parents[1] / "packaging" / "hospital" / "orthanc_watcher.py"
_SPEC = importlib.util.spec_from_file_location("orthanc_watcher", SCRIPT)
watcher = importlib.util.module_from_spec(_SPEC)
sys.modules["orthanc_watcher"] = watcher
_SPEC.loader.exec_module(watcher)


def free_ports(count):
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


class Archive:
    """A running Orthanc, for which a study is stable after so many seconds."""

    def __init__(self, folder, stable=1):
        self.program, self.storescu = judge("orthanc", "Orthanc", "/usr/sbin/Orthanc"), judge("dcmtk", "storescu")
        self.folder = folder
        self.http, self.dicom = free_ports(2)
        settings = {"Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db")}
        settings |= {"HttpPort": self.http, "DicomPort": self.dicom, "DicomAet": "ORTHANC", "StableAge": stable}
        settings |= {"RemoteAccessAllowed": False, "DicomAlwaysAllowFind": True}
        settings |= {"OverwriteInstances": True}  # each arrival counts as new: the hard case
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.url = f"http://127.0.0.1:{self.http}"
        self.start()

    def start(self):
        with (self.folder / "orthanc.log").open("a") as log:
            self.process = subprocess.Popen([self.program, self.folder / "orthanc.json"], stdout=log, stderr=log)
        eventually(lambda: self.get("/system"))

    def stop(self):
        self.process.terminate()
        self.process.wait(20)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.loads(answer.read())

    def send(self, *folders):
        """Send folders at the same time."""
        words = [self.storescu, "+sd", "+r", "-aec", "ORTHANC", "127.0.0.1", str(self.dicom)]
        for process in [subprocess.Popen([*words, folder]) for folder in folders]:
            assert process.wait(60) == 0

    def series(self):
        """Patient ID → the series of the patient's only study."""
        studies = [self.get(f"/studies/{study}") for study in self.get("/studies")]
        return {s["PatientMainDicomTags"]["PatientID"]: self.get(f"/studies/{s['ID']}/series") for s in studies}

    def image(self, series):
        with urllib.request.urlopen(f"{self.url}/instances/{series['Instances'][0]}/file") as answer:
            return pydicom.dcmread(io.BytesIO(answer.read()))


def eventually(true, seconds=60):
    """Wait until something is true; what fails to answer is not."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := true():
                return found
        except (OSError, ValueError):
            pass
        assert time.monotonic() < end, "too slow"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    started = Archive(tmp_path_factory.mktemp("orthanc"))
    yield started
    started.stop()


@contextmanager
def watching(archive, state, settings, log):
    """The watcher with the real module, as a process of its own; it is killed in the end, so that nothing is tidied."""
    state.mkdir(exist_ok=True)
    (state / "settings.json").write_text(json.dumps(settings))
    words = [sys.executable, SCRIPT, "--orthanc", archive.url, "--to", f"ORTHANC@127.0.0.1:{archive.dicom}"]
    words += ["--state", state, "--settings", state / "settings.json", "--every", "0.2", "--quiet", "1"]
    words += ["--from-beginning", "--"]
    words += [sys.executable, "-c", "from crossmr.mercure import main; main()"]
    with log.open("a") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def test_studies_come_in_and_derived_series_go_back_once(archive, model_folder, tmp_path):
    """Two at once, one of them broken; the watcher is killed at work and goes on; the other study is sent again."""
    for patient in ("Ann", "Cem"):
        dicoms.write(tmp_path / patient, ("t1n", "t2w"), patient=patient)
    for path in (tmp_path / "Cem" / "3").iterdir():
        image = pydicom.dcmread(path)
        image.PixelData = image.PixelData[: len(image.PixelData) // 4 * 2]
        image.save_as(path)
    state, log, settings = tmp_path / "state", tmp_path / "log", {"model": str(model_folder), "device": "cpu"}
    archive.send(tmp_path / "Ann", tmp_path / "Cem")
    with watching(archive, state, settings, log) as first:
        eventually(lambda: list(state.glob("work/in/task.json")) and modules(first))
        (module,) = modules(first)
        assert stat.S_IMODE((state / "work").stat().st_mode) == 0o700
    eventually(lambda: not is_running(module), 3)
    assert (state / "work").exists()
    with watching(archive, state, settings, log):
        eventually(lambda: sorted(len(of) for of in archive.series().values()) == [2, 4] and not waiting(state))
        archive.send(tmp_path / "Ann")
        changes = archive.get("/changes?last")["Last"]
        eventually(lambda: archive.get("/changes?last")["Last"] > changes)  # stable again
        eventually(lambda: read(state)["since"] >= archive.get("/changes?last")["Last"] and not waiting(state))
    assert not (state / "work").exists()
    series = archive.series()
    assert {patient: len(of) for patient, of in series.items()} == {"Ann": 4, "Cem": 2}
    scan, *_ = (archive.image(one) for one in series["Ann"] if one["MainDicomTags"]["Manufacturer"] == "ACME")
    derived = [one for one in series["Ann"] if one["MainDicomTags"]["Manufacturer"] == "crossmr"]
    for image in map(archive.image, derived):
        same = ("StudyInstanceUID", "PatientID", "PatientName", "FrameOfReferenceUID", "AccessionNumber", "Rows")
        assert {key: image[key].value for key in same} == {key: scan[key].value for key in same}
        np.testing.assert_allclose(image.ImageOrientationPatient, scan.ImageOrientationPatient, atol=1e-6)
        assert list(image.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert image.SeriesDescription.startswith("SYNTHETIC ")
    assert {len(one["Instances"]) for one in derived} == {dicoms.SHAPE[2]}
    (note,) = (state / "notes").iterdir()
    assert "cut off" in note.read_text() or "cannot be read" in note.read_text()
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    said = log.read_text()
    assert said.count("sent; 2 series sent") == 1
    assert not [word for word in (*PERSONAL, "Ann", "Cem") if word in said + note.read_text()]


def modules(process):
    """The children of a process."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def is_running(number):
    status = Path(f"/proc/{number}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def read(state):
    return json.loads((state / "state.json").read_text())


def waiting(state):
    return read(state)["waiting"]


COMMAND = ("module", "-v", "{in}:/in:ro", "{out}")


class FalseArchive(watcher.Orthanc):
    """An archive of studies of one series, in memory; `lost` images cannot be read."""

    def __init__(self):
        super().__init__("http://127.0.0.1:1")
        self.changes, self.studies, self.marks, self.lost = [], {}, {}, set()

    def arrive(self, study, *images, stable=True, maker="ACME", description=""):
        if study not in self.studies:
            self.change("NewStudy", study)
        series = {"ID": f"{study}-{maker}", "Instances": list(images)}
        tags = {"Modality": "MR", "Manufacturer": maker, "SeriesInstanceUID": f"1.2.{len(self.changes)}"}
        stored = self.studies.setdefault(study, {"series": [], "latest": "20200101T000000"})
        stored["described"] = {"StudyDescription": description} if description else {}
        stored["series"].append(series | {"MainDicomTags": tags})
        stored["stable"] = stable
        if stable:
            self.change("StableStudy", study)

    def change(self, kind, study):
        self.changes.append({"Seq": len(self.changes) + 1, "ChangeType": kind, "ID": study})

    def ask(self, path, *, put=None):
        if path == "/changes?last":
            return json.dumps({"Last": len(self.changes)}).encode()
        if path.startswith("/changes?since="):
            since = int(path.partition("=")[2].partition("&")[0])
            return json.dumps(
                {"Changes": self.changes[since : since + 2], "Done": since + 2 >= len(self.changes)}
            ).encode()
        _, kind, name, *rest = path.split("/")
        if kind == "instances" and name not in self.lost:
            return b"image"
        if kind == "studies" and name in self.studies:
            study = self.studies[name]
            if rest == ["series"]:
                return json.dumps(study["series"]).encode()
            if rest and put is not None:
                self.marks[name] = put
                return b""
            if rest and name in self.marks:
                return self.marks[name].encode()
            if not rest:
                found = {"IsStable": study["stable"], "LastUpdate": study["latest"]}
                return json.dumps(found | {"MainDicomTags": study["described"]}).encode()
        code = 500 if kind == "instances" else 404
        raise urllib.error.HTTPError(path, code, "", None, None)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A false archive, and a way to make a watcher whose module and storescu are scripts that note their calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    archive, calls, open_ones = FalseArchive(), tmp_path / "calls", []

    def make(together=False, module='echo > "$MERCURE_OUT_DIR/9.9#1.dcm"', storescu="", **options):
        for name, body in (("module", f"{module}"), ("storescu", storescu)):
            (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{body}\n')
            (programs / name).chmod(0o755)
        settings = watcher.Options(tmp_path / "state", "PACS@host:104", COMMAND, {"std": False}, pause=0, **options)
        while open_ones and not together:
            open_ones.pop().close()
        made = watcher.Watcher(archive, settings)
        open_ones.append(made)
        made.start(from_beginning=False)
        return made

    def called():
        return [line.split()[0] for line in calls.read_text().splitlines()] if calls.exists() else []

    yield archive, make, called, tmp_path / "state"
    for one in open_ones:
        one.close()


def test_only_what_arrives_after_the_first_start_is_handled_and_a_restart_goes_on(desk):
    archive, make, called, state = desk
    archive.arrive("old", "a")
    first = make()
    first.round()
    assert called() == []
    for study in ("one", "two"):
        archive.arrive(study, "b", "c")
    second = make()
    second.round()
    assert called() == ["module", "storescu"] * 2
    second.round()
    archive.arrive("one", "z", maker="crossmr")  # what was sent comes back
    second.round()
    assert called() == ["module", "storescu"] * 2
    assert read(state) == {"since": len(archive.changes), "waiting": [], "failed": {}}


def test_a_study_waits_until_it_is_stable_and_a_deleted_one_is_forgotten(desk):
    archive, make, called, state = desk
    made = make()
    archive.arrive("one", "a", stable=False)
    archive.arrive("gone", "a", stable=False)
    made.round()
    assert (called(), waiting(state)) == ([], ["one", "gone"])
    del archive.studies["gone"]
    archive.studies["one"] |= {"stable": True, "latest": f"{datetime.now(UTC):%Y%m%dT%H%M%S}"}  # Orthanc was restarted
    made.round()
    assert (called(), waiting(state)) == ([], ["one"])
    archive.studies["one"]["latest"] = f"{datetime.now(UTC) - timedelta(seconds=61):%Y%m%dT%H%M%S}"
    made.round()
    assert (called(), waiting(state)) == (["module", "storescu"], [])


def test_what_was_held_back_is_noted(desk):
    archive, make, called, state = desk
    said = '{"status": "held back", "__mercure_notification": {"requested": true, "text": "Nothing sent: refused."}}'
    made = make(module=f"echo '{said}' > \"$MERCURE_OUT_DIR/result.json\"")
    archive.arrive("one", "a")
    made.round()
    note = state / "notes" / "one.txt"
    assert "Nothing sent: refused." in note.read_text()
    note.unlink()
    made.round()
    assert called() == ["module"]


def test_only_the_studies_that_are_meant_are_handled(desk):
    archive, make, called, state = desk
    made = make(description="*Brain*")
    for study, description in (("one", "MRI BRAIN W/O"), ("two", "MRI KNEE"), ("three", "")):
        archive.arrive(study, "a", description=description)
    made.round()
    assert (called(), waiting(state), list(archive.marks)) == (["module", "storescu"], [], ["one"])


def test_images_that_arrive_meanwhile_or_later_count(desk):
    archive, make, called, state = desk
    made = make()
    archive.arrive("one", "a")
    run, arrivals = made._run, [("b",)]

    def run_while_more_arrives(*given):
        found = run(*given)
        if arrivals:
            archive.arrive("one", *arrivals.pop())
        return found

    made._run = run_while_more_arrives
    made.round()
    assert called() == ["module"]
    made.round()
    assert called() == ["module", "module", "storescu"]
    archive.arrive("one", "x", maker="crossmr")
    archive.arrive("one", "c")
    made.round()
    assert called() == ["module", "module", "storescu", "module", "storescu"]
    note = (state / "notes" / "one.txt").read_text()
    assert f"{watcher.OUTDATED} 1.2." in note


@pytest.mark.parametrize(
    ("module", "storescu", "said"),
    [
        ('echo \'{"error": "no T1"}\' > "$MERCURE_OUT_DIR/result.json"; exit 1', "", "no T1"),
        ("exit 3", "", "ended with exit code 3 and left no result.json"),
        ("sleep 60", "", "stopped after 0.001 minutes"),
        (None, "exit 1", "could not be sent to PACS@host:104"),
    ],
)
def test_a_failure_leaves_a_note_and_its_deletion_tries_again(module, storescu, said, desk, capsys):
    archive, make, called, state = desk
    made = make(
        **({"module": module} if module else {}),
        storescu=storescu,
        **({"minutes": 0.001} if "sleep" in f"{module}" else {}),
    )
    archive.arrive("one", "a")
    archive.arrive("two", "b")
    made.round()
    note = state / "notes" / "one.txt"
    assert said in note.read_text()
    assert called().count("module") == 2
    assert called().count("storescu") == (2 * watcher.ATTEMPTS if storescu else 0)
    archive.change("StableStudy", "one")  # the same study is sent once more
    made.round()
    assert called().count("module") == 2
    assert not (state / "work").exists()
    note.unlink()
    again = make()
    again.round()
    assert called().count("module") == 3
    assert not note.exists()
    assert (state / "notes" / "two.txt").exists()
    assert list(read(state)["failed"]) == ["two"]
    assert "one: done; 1 series sent" in capsys.readouterr().out


def test_a_study_that_orthanc_cannot_give_stops_no_other(desk):
    archive, make, called, state = desk
    made = make()
    archive.lost = {"a"}
    archive.arrive("one", "a")
    archive.arrive("two", "b")
    made.round()
    assert (called(), waiting(state)) == (["module", "storescu"], ["one"])
    for _ in range(watcher.ATTEMPTS - 1):
        made.round()
    assert waiting(state) == []
    assert "it answers 500" in (state / "notes" / "one.txt").read_text()


def test_an_index_that_was_replaced_is_not_handled_as_a_whole(desk):
    archive, make, called, state = desk
    for study in "abc":
        archive.arrive(study, "a")
    make()
    archive.changes.clear()
    archive.studies.clear()
    archive.arrive("new", "a")
    made = make()
    made.round()
    assert (called(), read(state)["since"]) == ([], 2)


def test_one_watcher_at_a_time_in_a_folder_of_its_own(desk):
    _, make, _, state = desk
    make()
    (state / "work").mkdir()
    (state / "work" / "image.dcm").touch()
    with pytest.raises(SystemExit, match="Another watcher runs"):
        make(together=True)
    assert (state / "work").exists()
    make()
    assert not (state / "work").exists()
    assert {stat.S_IMODE(place.stat().st_mode) for place in (state, state / "notes")} == {0o700}


def test_the_module_gets_its_folders_and_the_settings(desk):
    archive, make, _, state = desk
    keep = state.parent / "kept"
    script = (
        f'exec > {keep}; echo "$*"; stat -c %a "$MERCURE_IN_DIR" "$TMPDIR"; cd "$MERCURE_IN_DIR"; ls; cat task.json'
    )
    made = make(module=script)
    archive.arrive("one", "a")
    made.round()
    words, *lines, task = keep.read_text().splitlines()
    assert words == f"-v {state}/work/in:/in:ro {state}/work/out"
    assert lines == ["700", "700", "one-ACME#a.dcm", "task.json"]
    assert json.loads(task)["process"] == {"settings": {"std": False}}


@pytest.mark.parametrize("to", ["PACS", "PACS@host", "@host:104", "PACS@host:x"])
def test_a_wrong_destination_is_refused(to, tmp_path, capsys):
    with pytest.raises(SystemExit):
        watcher.parse(["--to", to, "--state", str(tmp_path)])
    assert "expected TITLE@HOST:PORT" in capsys.readouterr().err


def test_while_orthanc_is_not_there_it_is_asked_again_and_sigterm_ends_it(tmp_path):
    (port,) = free_ports(1)
    words = [sys.executable, SCRIPT, "--orthanc", f"http://127.0.0.1:{port}", "--to", "A@127.0.0.1:1", "--every", "0.1"]
    process = subprocess.Popen([*words, "--state", tmp_path / "state"], stdout=subprocess.PIPE, text=True)
    assert "fails (URLError); it is tried again" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", None)
    assert process.returncode == 0
