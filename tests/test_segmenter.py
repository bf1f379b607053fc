"""A segmenter as a command: what it is given, what is read, and how it may fail."""

import shlex
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, write_study

from crossmr.data.naming import find_studies
from crossmr.data.nifti import is_synthetic
from crossmr.data.study import load_study
from crossmr.errors import ConfigError, StudyError
from crossmr.evaluation.segmenter import NAME, Segmenter

ALL = ("t1n", "t1c", "t2w", "t2f")
OTHERS = ("t1n", "t1c", "t2w")
HEAD = "import sys, pathlib, time, subprocess\nstudy, labels = map(pathlib.Path, sys.argv[1:])\n"
THRESHOLD = """
import nibabel as nib, numpy as np
image = nib.load(study / f"{study.name}-t2f.nii.gz")
made = (np.asarray(image.dataobj) > 500).astype(np.uint8) * 3
nib.save(nib.Nifti1Image(made, image.affine), labels)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_study(folder, "Ann Smith", ALL, lesion=True)
    return load_study(find_studies(folder)[0])


@pytest.fixture
def command(tmp_path):
    """A command of some lines of Python, which a path with a blank leads to."""

    def write(body, seconds=60.0):
        script = tmp_path / "a segmenter.py"
        script.write_text(HEAD + body)
        return Segmenter(f"{shlex.quote(sys.executable)} '{script}' {{study}} {{labels}}", seconds)

    return write


def outline(segmenter, study, images=None):
    return dict(segmenter.outline(study, "t2f", images or {}, OTHERS))


def test_it_outlines_each_image_and_then_the_real_one(study, command):
    bright = np.zeros(SHAPE[::-1], np.float32)
    bright[3:5, 4:9, 6:8] = 1000
    outlined = outline(command(THRESHOLD), study, {"own": bright, "zeros": 0 * bright})
    assert list(outlined) == ["own", "zeros", ""]
    np.testing.assert_array_equal(outlined["own"], 3 * (bright > 0))
    assert not outlined["zeros"].any()
    assert outlined[""].dtype == np.uint8


def test_it_is_given_four_contrasts_and_nothing_that_tells_the_case_or_its_labels(study, command, tmp_path):
    """Neither a name nor a segmentation; and of two runs neither sees what the other left."""
    seen = tmp_path / "seen"
    keep = f"""
import shutil
seen = pathlib.Path({str(seen)!r})
seen.mkdir(exist_ok=True)
shutil.copytree(study.parent, seen / str(len(list(seen.iterdir()))))
(study / "left.nii.gz").write_bytes(b"")
(study.parent / "left.txt").write_text("")
"""
    outline(command(keep + THRESHOLD), study, {"own": np.full(SHAPE[::-1], 0.5, np.float32)})
    expected = sorted([NAME, "said.txt", *(f"{NAME}/{NAME}-{m}.nii.gz" for m in ALL)])
    for run in (seen / "0", seen / "1"):
        assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == expected
        for m in OTHERS:
            stored = nib.load(run / NAME / f"{NAME}-{m}.nii.gz")
            np.testing.assert_array_equal(np.asarray(stored.dataobj).T, study.volumes[m].data)
            np.testing.assert_array_equal(stored.affine, study.reference.affine)
            assert b"Ann" not in stored.header.binaryblock
    image = seen / "0" / NAME / f"{NAME}-t2f.nii.gz"
    assert np.all(np.asarray(nib.load(image).dataobj) == 0.5)
    assert is_synthetic(image)
    assert not is_synthetic(seen / "1" / NAME / f"{NAME}-t2f.nii.gz")


def test_no_shell_reads_the_command(study, command, tmp_path):
    segmenter = command(THRESHOLD)
    with pytest.raises(StudyError, match="ended with code 1"):
        outline(Segmenter(f"{segmenter.command} ; touch {tmp_path / 'touched'}"), study)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('loading'); sys.exit('no weights in models/')", r"ended with code 1: no weights in models/\. Try it"),
        ("sys.exit(3)", r"ended with code 3\. Try it by hand"),
        ("", r"the segmenter ended well, but wrote no \{labels\}"),
        ("labels.write_bytes(b'nothing')", "the segmenter's labels are not usable: .*labels.nii.gz"),
        (THRESHOLD.replace("* 3", "* 9 + 1"), "the segmenter gave a label 10; BraTS has 0 to 4"),
        (THRESHOLD.replace("made,", "made[2:],"), "labels are not usable: .*Resample"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(study, command, body, message):
    images = {"own": np.full(SHAPE[::-1], 1000, np.float32)}
    with pytest.raises(StudyError, match=f"^Ann Smith: .*{message}") as error:
        outline(command(body), study, images)
    assert "\n" not in str(error.value)


def test_it_is_stopped_after_its_time_with_all_that_it_started(study, command, tmp_path):
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    slow = f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    started = time.monotonic()
    with pytest.raises(StudyError, match=r"Ann Smith: the segmenter took more than 0\.8 s, and was stopped"):
        outline(command(slow, seconds=0.8), study)
    assert time.monotonic() - started < 30
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python segment.py {study}", r"it lacks \{labels\}\. Expected such as --segmenter 'python"),
        ("python segment.py {labels}", r"it lacks \{study\}"),
        ("no-such-program {study} {labels}", "there is no program no-such-program"),
        ("python 'segment.py {study} {labels}", "No closing quotation"),
        ("", "--segmenter is empty"),
    ],
)
def test_a_command_that_cannot_run_is_refused_at_once(command, message):
    with pytest.raises(ConfigError, match=message):
        Segmenter(command)
