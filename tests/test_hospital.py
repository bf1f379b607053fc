"""The files under packaging/hospital and what docs/hospital.md says of them."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import dicoms
import pydicom
import pytest
from test_orthanc import watcher

from crossmr.mercure import ModuleSettings

ROOT = Path(__file__).parents[1]
FILES = ROOT / "packaging" / "hospital"
PAGE = (ROOT / "docs" / "hospital.md").read_text()
(XNAT,) = json.loads((FILES / "xnat-command.json").read_text())


def test_the_page_lists_every_setting_with_its_default():
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE.partition("| outcome")[0], flags=re.MULTILINE))
    assert list(listed) == [field.name for field in fields(ModuleSettings)]
    defaults = ModuleSettings()
    for name, said in listed.items():
        if said.startswith("`"):
            assert json.loads(said.strip("`")) == getattr(defaults, name)
        else:
            assert getattr(defaults, name) is None


def test_every_file_is_named_on_the_page():
    for path in FILES.iterdir():
        assert path.name in PAGE or path.name == "__pycache__", path.name


def test_the_service_starts_the_watcher(tmp_path):
    service = configparser.ConfigParser(interpolation=None, strict=False)
    service.optionxform = str
    service.read(FILES / "crossmr-orthanc.service")
    (tmp_path / "orthanc").write_text("reader:secret\n")
    line = service["Service"]["ExecStart"].replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))
    script, *arguments = shlex.split(line)
    assert Path(script).name == "orthanc_watcher.py"
    orthanc, options, _ = watcher.parse(arguments)
    assert orthanc.headers == {"Authorization": "Basic cmVhZGVyOnNlY3JldA=="}
    assert options.to == "ORTHANC@127.0.0.1:4242"
    assert [Path(options.command[0]).name, *options.command[1:]] == ["crossmr-mercure"]


def test_xnats_command_names_its_own_parts():
    mounts = {mount["name"]: mount["writable"] for mount in XNAT["mounts"]}
    assert mounts == {"in": False, "out": True}
    outputs = {output["name"]: output["mount"] for output in XNAT["outputs"]}
    for wrapper in XNAT["xnat"]:
        inputs = {one["name"]: one["provides-files-for-command-mount"] for one in wrapper["external-inputs"]}
        assert set(inputs.values()) == {"in"}
        for handler in wrapper["output-handlers"]:
            assert handler["as-a-child-of"] in inputs
            assert outputs[handler["accepts-command-output"]] == "out"


@pytest.mark.parametrize("empty", [False, True])
def test_xnats_command_completes_a_session_as_xnat_lays_it_out(empty, tmp_path, model_folder):
    """A T1ce that is refused makes no failure of XNAT's, which would store nothing; a session without images does."""
    session = tmp_path / "input"
    for number, modality in enumerate(("t1n", "t2w", "t1c"), 2):
        scan = session / "SCANS" / str(number) / "DICOM"
        dicoms.write_series(scan, dicoms.head(modality), dicoms.OBLIQUE, modality, number=number)
        (scan / f"scan_{number}_catalog.xml").write_text("<cat:Catalog/>")
    (session / "RESOURCES" / "NOTES").mkdir(parents=True)
    (session / "RESOURCES" / "NOTES" / "notes.txt").write_text("none")
    for path in [*session.rglob("*.dcm")] if empty else [*scan.glob("*.dcm")][:1]:
        path.write_bytes(path.read_bytes()[:300])
    command = tmp_path / "bin" / "crossmr"
    command.parent.mkdir()
    start = f'{sys.executable} -c "from crossmr.cli import main; main()"'
    command.write_text(f'#!/bin/sh\nexec {start} "$@" --model {model_folder} --device cpu\n')
    command.chmod(0o755)
    line = XNAT["command-line"].replace("/input", str(session)).replace("/output", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    ended = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True)
    assert (ended.returncode != 0) == empty, ended.stderr
    derived = [pydicom.dcmread(path) for path in (tmp_path / "output").rglob("*.dcm")]
    described = set() if empty else {"SYNTHETIC FLAIR (crossmr)"}
    assert {image.SeriesDescription for image in derived} == described
