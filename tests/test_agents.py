"""T1 series of DICOM that no tag tells apart: their voxels do, where they are sure; else both stay in doubt."""

import json

import dicoms
import numpy as np
import pytest
from conftest import save_untrained

from crossmr.completion.cohort import complete_cohort
from crossmr.completion.inputs import find_inputs
from crossmr.completion.study import complete
from crossmr.completion.unread import unread_series
from crossmr.data.enhancement import Comparison
from crossmr.data.naming import find_studies
from crossmr.data.volume import read_volume
from crossmr.dicom import agents
from crossmr.dicom.agents import in_question, may_be_other, plain_by_order, tell_apart, undecided
from crossmr.dicom.convert import convert
from crossmr.dicom.selection import choose
from crossmr.dicom.series import find_series
from crossmr.display import Display
from crossmr.errors import StudyError
from crossmr.networks.inference import InferenceSettings
from crossmr.phantom import write_cohort

SILENT = {"description": "AX T1"}
AGENT = {"ContrastBolusAgent": "Gadavist"}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Modality → (voxels, affine) of a head with skull and vessels, as DICOM stores it."""
    folder = tmp_path_factory.mktemp("phantom")
    write_cohort(folder, 1, seed=3, shape=(72, 84, 32), spacing_mm=(2.6, 2.6, 5.0))
    (files,) = find_studies(folder)
    volumes = {m: read_volume(path) for m, path in files.images().items()}
    return {m: (np.rint(np.maximum(v.data.transpose(2, 1, 0), 0)).astype(int), v.affine) for m, v in volumes.items()}


def write(folder, phantom, **series):
    """Series called `_2`, `_5`, ... of the phantom's contrasts, all of them silent T1 but T2 and FLAIR."""
    for number, modality in series.items():
        timing = modality if modality in ("t2w", "t2f") else "t1n"
        words = SILENT if timing == "t1n" else {"description": modality}
        dicoms.write_series(folder / number, *phantom[modality], timing, number=int(number[1:]), **words)


@pytest.mark.parametrize(("plain", "bright"), [(2, 5), (5, 2)])
def test_vessels_tell_which_of_two_silent_t1_is_enhanced(plain, bright, phantom, tmp_path):
    write(tmp_path / "in", phantom, **{f"_{plain}": "t1n", "_3": "t2w", f"_{bright}": "t1c"})
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert {m: s.number for m, s in scans.series.items()} == {"t1n": plain, "t1c": bright, "t2w": 3}
    (note,) = scans.notes
    assert note.startswith(f"series {bright} was taken for T1ce: ")
    assert f"vessels brighter than in series {plain}, by a test that was sure of" in note
    assert "Name it with --map" in note
    assert any(f"series {bright} is t1c (SE, TR 550 ms, TE 12 ms; vessels brighter" in line for line in scans.lines())
    record = json.loads((tmp_path / "out" / scans.case / "series.json").read_text())
    assert "vessels darker than in" in record["taken"]["t1n"]["why"]


def test_the_decision_stands_in_the_manifest_and_the_terminal(phantom, tmp_path, capsys):
    write(tmp_path / "in", phantom, _2="t1n", _3="t2w", _4="t2f", _5="t1c")
    model = save_untrained(tmp_path / "model")
    settings = InferenceSettings(ddim_steps=2, device="cpu", precision="float32")
    summary = complete_cohort(tmp_path / "in", tmp_path / "out", model, settings, display=Display())
    (case,) = summary.complete
    manifest = json.loads((tmp_path / "out" / case / "manifest.json").read_text())
    assert not manifest["unread"]
    assert not manifest["not_filled"]
    assert any(note.startswith("series 5 was taken for T1ce") for note in manifest["notes"])
    assert "series 5 is t1c" in capsys.readouterr().out
    alone = complete(tmp_path / "in", model, settings)
    assert list(alone.manifest["acquired"]) == ["t1n", "t1c", "t2w", "t2f"]
    assert any(note.startswith("series 5 was taken for T1ce") for note in alone.manifest["notes"])


def test_what_the_voxels_cannot_tell_stays_in_doubt(phantom, tmp_path):
    write(tmp_path / "in", phantom, _2="t1n", _3="t2w", _5="t1n")
    inputs = find_inputs([tmp_path / "in"])
    (all_series,) = inputs.series.values()
    (unread,) = unread_series(all_series)
    assert unread.name == "series 5"
    assert unread.may_be == {"t1c"}
    assert "nor do their volumes; name it with --map t1c='DESCRIPTION'" in unread.why


def series_of(folder, *each):
    """T1 series with these tags, in small."""
    for number, tags in enumerate(each, 1):
        dicoms.write_series(folder / str(number), dicoms.head(), dicoms.OBLIQUE, number=number, **tags)
    return find_series(folder)


def told(monkeypatch, all_series, scores, fails=()):
    """Number → modality, when the scores of these pairs of numbers come out."""

    def read(series):
        if series.number in fails:
            raise StudyError("damaged")
        return series.number

    monkeypatch.setattr(agents, "compare", lambda a, b: Comparison(scores.get((a, b), 0.0), 0.9))
    return {series.number: series.modality for series in tell_apart(all_series, read)}


@pytest.mark.parametrize(
    ("scores", "modalities"),
    [
        ({(1, 2): 1}, ["t1n", "t1c", None]),
        ({(1, 2): 1, (1, 3): 1}, ["t1n", "t1c", "t1c"]),
        ({(1, 3): 1, (2, 3): 1}, ["t1n", "t1n", "t1c"]),
        ({(1, 3): -1}, ["t1c", None, "t1n"]),
        ({(1, 2): 1, (2, 3): 1}, ["t1n", None, "t1c"]),
        ({(1, 2): 1, (2, 3): 1, (1, 3): -1}, ["t1n", "t1n", "t1n"]),
        ({(1, 2): 0.1}, ["t1n", "t1n", "t1n"]),
    ],
)
def test_of_several_series_each_is_compared_with_each(scores, modalities, tmp_path, monkeypatch):
    all_series = series_of(tmp_path, SILENT, SILENT, SILENT)
    assert list(told(monkeypatch, all_series, scores).values()) == modalities


def test_unlike_sequences_must_differ_by_more(tmp_path, monkeypatch):
    gradient = SILENT | {"ScanningSequence": ["GR", "IR"], "SequenceVariant": "MP", "EchoTime": 3, "InversionTime": 900}
    all_series = series_of(tmp_path, SILENT, gradient, gradient)
    assert {s.modality for s in all_series} == {"t1n"}
    assert told(monkeypatch, all_series, {(1, 2): 0.9}) == {1: "t1n", 2: "t1n", 3: "t1n"}
    assert told(monkeypatch, all_series, {(1, 2): 1.1}) == {1: "t1n", 2: "t1c", 3: None}
    assert told(monkeypatch, all_series, {(2, 3): 0.9}) == {1: None, 2: "t1n", 3: "t1c"}


def test_series_that_all_name_an_agent_are_told_apart_too(tmp_path, monkeypatch):
    all_series = series_of(tmp_path, SILENT | AGENT, SILENT | AGENT)
    assert {s.modality for s in all_series} == {"t1c"}
    assert told(monkeypatch, all_series, {(1, 2): 1}) == {1: "t1n", 2: "t1c"}


T2 = {"RepetitionTime": 4500, "EchoTime": 95, "description": "AX T2"}


@pytest.mark.parametrize(
    ("score", "modalities", "telling"),
    [
        (1, ["t1n", "t2w", "t1c"], "vessels darker than in series 3"),
        (-1, ["t1c", "t2w", "t1c"], "vessels brighter than in series 3"),
        (0.1, ["t1n", "t2w", "t1c"], ""),
    ],
)
def test_a_t1_that_is_plain_by_order_alone_is_compared(score, modalities, telling, tmp_path, monkeypatch):
    all_series = series_of(tmp_path, *(one | AGENT for one in (SILENT, T2, SILENT)))
    assert [plain_by_order(series) for series in all_series] == [True, False, False]
    assert in_question(all_series)
    assert not undecided(all_series)
    monkeypatch.setattr(agents, "compare", lambda a, b: Comparison(score, 0.9))
    told = tell_apart(all_series, lambda series: series.number)
    assert [series.modality for series in told] == modalities
    assert telling in told[0].told
    assert told[0].compared
    doubts = {one.name: {*one.may_be} for one in unread_series(told)}
    assert doubts == ({"series 1": {"t1n"}} if score < 0 else {})
    assert any("taken for T1 as it was acquired first" in note for note in choose(told)[2]) == (score == 0.1)


def test_what_is_plain_before_words_or_by_the_user_is_not_compared(tmp_path):
    studies = (SILENT, T2, {"description": "AX T1 GD"}), (SILENT, T2, SILENT)
    for name, study in zip(("words", "mapped"), studies, strict=True):
        for number, tags in enumerate(study, 1):
            place = tmp_path / name / str(number)
            dicoms.write_series(place, dicoms.head(), dicoms.OBLIQUE, number=number, **tags | AGENT)
    assert not in_question(find_series(tmp_path / "words"))
    assert not in_question(find_series(tmp_path / "mapped", {"t1n": "series 1"}))


@pytest.mark.parametrize(
    ("description", "agent", "other"),
    [("T1 BASAL", "Gadavist", True), ("T1 CONTRAST", "NONE", True), ("T1 nativ", "Gadavist", False)],
)
def test_a_word_that_may_mean_something_else_settles_nothing_against_a_tag(description, agent, other, tmp_path):
    (series,) = series_of(tmp_path, {"description": description, "ContrastBolusAgent": agent})
    assert may_be_other(series) == other


def test_voxels_never_overrule_a_tag(tmp_path, monkeypatch):
    all_series = series_of(tmp_path, SILENT, SILENT | {"ContrastBolusAgent": "NONE"})
    assert [may_be_other(series) for series in all_series] == [True, False]
    assert told(monkeypatch, all_series, {(1, 2): 1}) == {1: "t1n", 2: "t1n"}
    assert told(monkeypatch, all_series, {(1, 2): -1}) == {1: "t1c", 2: "t1n"}


def test_a_series_that_a_tag_settles_stays_where_only_others_are_told_apart(tmp_path, monkeypatch):
    all_series = series_of(tmp_path, SILENT, SILENT, SILENT | {"ContrastBolusAgent": "NONE"})
    assert told(monkeypatch, all_series, {(1, 2): 1}) == {1: "t1n", 2: "t1c", 3: "t1n"}


@pytest.mark.parametrize(
    "each",
    [
        (SILENT,),
        (SILENT, {"description": "AX T1 GD"}),
        ({"description": "T1 nativ"}, {"description": "T1 sans gado"}),
    ],
)
def test_nothing_is_read_where_tags_and_words_tell(each, tmp_path, monkeypatch):
    all_series = series_of(tmp_path, *each)
    assert undecided(all_series) == []
    assert tell_apart(all_series, lambda series: pytest.fail("read")) == all_series


def test_a_series_that_cannot_be_read_tells_nothing(tmp_path, monkeypatch):
    all_series = series_of(tmp_path, SILENT, SILENT)
    assert told(monkeypatch, all_series, {(1, 2): 1}, fails=[2]) == {1: "t1n", 2: "t1n"}
    assert not any(series.compared for series in all_series)
    assert list(choose(all_series)[0]) == ["t1n"]
