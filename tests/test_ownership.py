"""Nothing of others is ever replaced or deleted, by any verb, whatever its output folder is."""

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import image, make_head, save_untrained, write_study
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossmr.completion import layout
from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.layout import EXPECTED, PROFILES, Layout, records_of
from crossmr.completion.ownership import earlier_files
from crossmr.data.prepare import prepare
from crossmr.demo import _claimed as claim_demo
from crossmr.errors import CrossmrError, OutputError
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.files import locked, write_json
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.output.nnunet import export_nnunet
from crossmr.output.report import report_completion, report_evaluation
from crossmr.output.viewer import view_case
from crossmr.parts import Part
from crossmr.phantom import Phantom, write_cohort
from crossmr.phantom import cohort as phantom_cohort
from crossmr.picture import save_picture
from crossmr.registry import export_model
from crossmr.training.start import WRITTEN
from crossmr.training.start import _refuse_foreign as refuse_run

SETTINGS = InferenceSettings(ddim_steps=1, precision="float32")
BIDS, CHALLENGE = (CohortSettings(profile=profile) for profile in ("bids", "challenge"))


def contents(folder):
    """Every file, folder and link below a folder; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def raw(tmp_path):
    """A BIDS dataset, with somebody's derivatives."""
    folder = tmp_path / "raw"
    (folder / "sub-01" / "anat").mkdir(parents=True)
    for suffix, modality in (("T1w", "t1n"), ("T2w", "t2w")):
        nib.save(image(make_head(modality)), folder / "sub-01" / "anat" / f"sub-01_{suffix}.nii.gz")
    (folder / "derivatives" / "other").mkdir(parents=True)
    for place in (folder, folder / "derivatives" / "other"):
        (place / "dataset_description.json").write_text('{"Name": "mine", "Authors": ["me"]}')
        (place / "README").write_text("mine")
    (folder / ".bidsignore").write_text("extra/")
    return folder


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("raw", "raw is the input .*raw, and a BIDS derivative is a dataset of its own"),
        (".", "holds the input"),
        ("raw/sub-01", r"lies in the input .*Name another folder, such as .*raw/derivatives/crossmr"),
        ("raw/derivatives", "lies in the input"),
        ("raw/derivatives/../new", "lies in the input"),
        ("link", "link is the input"),
        ("raw/derivatives/other", r"other/dataset_description\.json is not crossmr's.*Name another folder"),
    ],
)
def test_a_bids_derivative_never_replaces_a_dataset(raw, model, tmp_path, out, match):
    (tmp_path / "link").symlink_to(raw)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=match):
        complete_cohort(raw, tmp_path / out, model, SETTINGS, BIDS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["README", ".bidsignore"])
def test_a_bids_derivative_is_no_folder_with_another_s_readme(raw, model, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"{name} is not crossmr's"):
        complete_cohort(raw, tmp_path / "out", model, SETTINGS, BIDS)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_a_bids_derivative_goes_on_and_keeps_what_was_written_into_its_readme(raw, model, tmp_path):
    out = raw / "derivatives" / "crossmr"
    before = contents(raw)
    assert complete_cohort(raw, out, model, SETTINGS, BIDS).completed == {"sub-01": ["t1c", "t2f"]}
    (out / "README").write_text("changed")
    assert complete_cohort(raw, out, model, SETTINGS, CohortSettings(profile="bids", overwrite=True)).failed == {}
    assert (out / "README").read_text() == "changed"
    assert before.items() <= contents(raw).items()
    sidecar = out / "sub-01" / "anat" / "sub-01_desc-synthetic_FLAIR.json"
    assert json.loads(sidecar.read_text())["GeneratedBy"][0]["Name"] == "crossmr"
    sidecar.write_text('{"GeneratedBy": [{"Name": "another"}, {"Name": "crossmr"}]}')
    before = contents(raw)
    with pytest.raises(OutputError, match=r"FLAIR\.json is not crossmr's"):
        complete_cohort(raw, out, model, SETTINGS, CohortSettings(profile="bids", overwrite=True))
    assert contents(raw) == before


@pytest.mark.parametrize("out", [".", "..", "out/..", "out/."])
def test_the_records_of_a_folder_without_a_name(small, model, tmp_path, monkeypatch, out):
    (tmp_path / "work" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    where = (tmp_path / "work" / out).resolve()
    result = complete_cohort(small, out, model, SETTINGS, CHALLENGE)
    assert list(result.failed) == ["Ann"]  # on another grid than BraSyn's
    records = records_of(Path(out))
    assert records.resolve() == where.with_name(f"{where.name}_records")
    assert (records / "manifest.json").exists()


def test_the_records_are_locked_and_not_another_s(small, model, tmp_path):
    records = tmp_path / "out_records"
    records.mkdir()
    (records / "thesis.tex").write_text("mine")
    with pytest.raises(
        OutputError, match=r"out_records holds thesis\.tex, which is not crossmr's.*Name another folder"
    ):
        complete_cohort(small, tmp_path / "out", model, SETTINGS, CHALLENGE)
    assert contents(records) == {"thesis.tex": b"mine"}
    (records / "thesis.tex").unlink()
    with Layout(records).locked():
        pass
    layout = Layout(tmp_path / "out", "challenge")
    with layout.locked():
        assert (records / ".crossmr.lock").exists()
        assert (layout.out / ".crossmr.lock").exists()


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(PROFILES, 2)])
def test_an_output_has_one_profile(small, model, tmp_path, first, second):
    complete_cohort(small, tmp_path / "out", model, SETTINGS, CohortSettings(profile=first))
    before = contents(tmp_path)
    records = re.escape(str(records_of(tmp_path / "out")))
    said = f"{records} holds the records of --profile {first}, and this is --profile {second}. Go on with .*{first}, or"
    for part in (None, Part(1, 2)):
        with pytest.raises(OutputError, match=said):
            complete_cohort(small, tmp_path / "out", model, SETTINGS, CohortSettings(profile=second, part=part))
    assert contents(tmp_path) == before


def test_a_run_that_began_has_its_profile(small, model, tmp_path):
    complete_cohort(small, tmp_path / "out", model, SETTINGS, CohortSettings(part=Part(2, 2)))
    with pytest.raises(OutputError, match="holds the records of --profile labelled"):
        complete_cohort(small, tmp_path / "out", model, SETTINGS, BIDS)


def test_the_records_are_no_other_output(small, model, tmp_path):
    complete_cohort(small, tmp_path / "out_records", model, SETTINGS)
    with pytest.raises(OutputError, match="out_records holds the records of --profile labelled"):
        complete_cohort(small, tmp_path / "out", model, SETTINGS, CHALLENGE)
    assert complete_cohort(small, tmp_path / "out", model, SETTINGS).failed == {}


# Any tree, any verb

STRANGERS = (
    *("thesis.tex", ".bashrc", ".git/config", "a/b/.hidden", "P1/notes.txt", "P1/P1-seg.nii.gz", "cohort/more.txt"),
    *(".film.mkv.partial", ".x.crossmr.partial", "P1/.scans.1.crossmr.partial/scan.dcm", ".lock", ".crossmr.lock"),
)
"""What lies about in any folder."""
OUTS = ("new", ".", "cohort", "cohort/P1", "link", "..")
"""Where a verb is told to write, as seen from a home that holds the cohort, and a link to itself."""
KINDS = ("file", "folder", "link", "dangling")
few = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def complete_as(profile: str) -> Callable[..., object]:
    def verb(home, out, model, completed):
        complete_cohort(home / "cohort", out, model, SETTINGS, CohortSettings(profile=profile, overwrite=True))
        report_completion(out)

    return verb


def evaluated(home, out, model, completed):
    evaluate(model, home / "cohort", out, EvaluationSettings(inference=SETTINGS))
    report_evaluation(out)


def begin_run(home, out, model, completed):
    with locked(out):
        refuse_run(out)
        write_json(out / "run.json", {"recipe": {}, "set": "", "budget": {}, "versions": {}})
        for name in WRITTEN:
            write_json(out / name if "." in name else out / name / "step-00000001.json", {})


def begin_demo(home, out, model, completed):
    with locked(out):
        claim_demo(out)
        save_picture(out / "shipped.png", [[("", np.zeros((4, 4), np.float32))]])
        with patch(phantom_cohort, "make_phantom", lambda *_, **__: TINY):
            write_cohort(out / "cohort", 1)


def viewed(home, out, model, completed):
    """OUT has been completed."""
    for path in completed.rglob("*"):
        if path.is_file() and not os.path.lexists(out / path.relative_to(completed)):
            with contextlib.suppress(OSError):
                (out / path.relative_to(completed)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / path.relative_to(completed))
    view_case(out, "P1")


VERBS: dict[str, Callable[..., object]] = {
    **{f"complete {profile}": complete_as(profile) for profile in PROFILES},
    "prepare": lambda home, out, model, completed: prepare(home / "cohort", out),
    "evaluate": evaluated,
    "train": begin_run,
    "demo": begin_demo,
    "nnunet": lambda home, out, model, completed: export_nnunet(home / "cohort", completed, out),
    "view": viewed,
    "export": lambda home, out, model, completed: export_model(home / "model", out / "mine.zip"),
}
TINY = Phantom({m: np.zeros((4, 4, 4), np.float32) for m in EXPECTED}, *np.zeros((2, 4, 4, 4), np.uint8), np.eye(4))


@contextlib.contextmanager
def patch(module, name, value):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A cohort, a model and a completed cohort, and what each verb writes into a new folder."""
    place = tmp_path_factory.mktemp("bench")
    write_study(place / "home" / "cohort", "P1", ("t1n", "t2w", "t2f"))
    save_untrained(place / "home" / "model", guidance="none", targets=("t1c", "t2f"))
    model = read_model(place / "home" / "model")
    complete_as("labelled")(place / "home", place / "completed", model, None)
    written = {}
    with patch(layout, "CHALLENGE_GRID", "28×32×24 at 6×6×7 mm"):
        for name, verb in VERBS.items():
            out = place / name / "new"
            out.mkdir(parents=True)
            verb(place / "home", out, model, place / "completed")
            files = [path for path in out.parent.rglob("*") if path.is_file()]
            written[name] = sorted(os.path.relpath(path, out) for path in files)
    written["view"] = ["view/P1.html"]
    return place, model, written


def put(path: Path, kind: str, target: Path) -> bool:
    """Put something of a stranger's there, if there is nothing yet; returns whether it could be put."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            return False
        if kind == "folder":
            path.mkdir()
            (path / "mine.txt").write_text("mine")
        elif kind == "file":
            path.write_text("mine")
        else:
            path.symlink_to(target if kind == "link" else target / "gone")
    except OSError:
        return False
    return True


def test_only_what_crossmr_wrote_counts_as_earlier(small, model, tmp_path):
    complete_cohort(small, tmp_path, model)
    layout = Layout(tmp_path)
    (case,) = (path.name for path in tmp_path.iterdir() if (path / "manifest.json").exists())
    synthetic = sorted((tmp_path / case).glob("*.nii.gz"))
    assert synthetic
    assert sorted(earlier_files(layout, case, ())) == synthetic
    shutil.copy(next(small.rglob("*.nii.gz")), synthetic[0])  # a scan under the name of a synthetic volume
    assert sorted(earlier_files(layout, case, ())) == synthetic[1:]


@few
@given(data=st.data(), verb=st.sampled_from(sorted(VERBS)), where=st.sampled_from(OUTS))
def test_nothing_of_a_stranger_s_is_touched(bench, data, verb, where):
    place, model, written = bench
    folders = {str(parent) for name in written[verb] for parent in Path(name).parents} - {".", ".."}
    name = st.sampled_from([*written[verb], *sorted(folders), *STRANGERS])
    chosen = data.draw(st.lists(st.tuples(name, st.sampled_from(KINDS)), max_size=3), label="strangers")
    with tempfile.TemporaryDirectory() as folder, patch(layout, "CHALLENGE_GRID", "28×32×24 at 6×6×7 mm"):
        home = Path(folder, "user", "home")
        shutil.copytree(place / "home", home)
        (home / "link").symlink_to(home)
        (home / "elsewhere").mkdir()
        out = home / where
        for name, kind in chosen:
            put(out / name, kind, home / "elsewhere")
        before = contents(Path(folder))
        try:
            VERBS[verb](home, out, model, place / "completed")
        except CrossmrError as error:
            refused = str(error)
        else:
            refused = ""
        after = contents(Path(folder))
        lost = {name for name, what in before.items() if name not in after or after[name] != what}
        assert not lost, refused
        if refused and verb != "view":
            new = {name for name in after.keys() - before.keys() if after[name] is not None}
            assert not new, refused


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_name_that_a_verb_writes_may_be_a_stranger_s(bench, verb, tmp_path):
    """The verb then stops before its first write, in a new folder and in an earlier output of its own."""
    place, model, written = bench
    home, out = tmp_path / "home", tmp_path / "home" / "new"
    shutil.copytree(place / "home", home)
    (home / "elsewhere").write_text("mine")
    with patch(layout, "CHALLENGE_GRID", "28×32×24 at 6×6×7 mm"):
        folders = {str(parent) for name in written[verb] for parent in Path(name).parents} - {".", ".."}
        new = [(False, name) for name in (*written[verb], *sorted(folders - {"../new_records"}))]
        for earlier, name in (*new, *((True, name) for name in written[verb])):
            if earlier and verb == "train" and "/" in name:  # in a run of ours, stages/ and the like are ours
                continue
            if earlier and verb not in ("nnunet", "export"):  # which want a new folder, or file
                shutil.copytree(place / verb, home, dirs_exist_ok=True)
                (out / name).unlink()
            else:
                out.mkdir()
            assert put(out / name, "link" if earlier else "file", home / "elsewhere")
            before = contents(home)
            if earlier and name in layout.BIDS_HEAD:  # of a dataset of ours: kept
                VERBS[verb](home, out, model, place / "completed")
                assert (out / name).readlink() == home / "elsewhere"
                assert (home / "elsewhere").read_text() == "mine"
            else:
                with pytest.raises(OutputError, match=r"[Nn]ame another"):
                    VERBS[verb](home, out, model, place / "completed")
                after = contents(home)
                assert before.items() <= after.items(), name
                assert verb == "view" or after == before, name
            for folder in (out, out.with_name("new_records")):
                shutil.rmtree(folder, ignore_errors=True)
