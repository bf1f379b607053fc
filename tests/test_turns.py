"""Whose turn it is: one study is read ahead, finished ones are not read, and memory is not overrun."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Listener, write_images

from crossmr import main_memory
from crossmr.completion import case as cases
from crossmr.completion import turns
from crossmr.completion.case import CohortSettings
from crossmr.completion.cohort import complete_cohort
from crossmr.completion.inputs import Inputs
from crossmr.completion.layout import Layout
from crossmr.completion.study import memory_needed
from crossmr.completion.work import Work
from crossmr.data.naming import StudyFiles, find_studies
from crossmr.data.study import load_study
from crossmr.errors import StudyError
from crossmr.networks.inference import InferenceSettings

SHAPE = (26, 28, 22)
SETTINGS = InferenceSettings(ddim_steps=3, device="cpu", precision="float32")
AGAIN = CohortSettings(overwrite=True)


def turns_of(tmp_path, studies, options, settings):
    """The turns of a process that completes these studies, and what failed."""
    given, layout = Inputs(tmp_path, studies), Layout(tmp_path / "out")
    run = SimpleNamespace(
        inputs=given,
        model=SimpleNamespace(record={}, config=SimpleNamespace(targets=("t1c",))),
        layout=layout,
        work=Work(layout),
        options=options,
        settings=settings,
        display=Listener(),
    )
    failed = {}
    return turns.Turns(run, failed.__setitem__), failed


def test_one_study_is_read_ahead_and_no_more(monkeypatch, tmp_path):
    loading, studies = [], [StudyFiles(str(k), str(k), {}, (), ()) for k in range(4)]

    def load(files, *, register, labels):
        assert (register, labels) == ("always", False)
        loading.append(files.case)
        if files.case == "2":
            raise StudyError("the third")
        return files.case

    monkeypatch.setattr(cases, "load_study", load)
    left, _ = turns_of(tmp_path, studies, CohortSettings(), replace(SETTINGS, register="always"))
    for number, (turn, study) in enumerate(turns.read_ahead(left)):
        assert turn.files is studies[number]
        if number == 2:
            with pytest.raises(StudyError, match="the third"):
                study.result()
        else:
            assert study.result() == str(number)
        assert len(loading) <= number + 2
    assert loading == ["0", "1", "2", "3"]


def test_finished_studies_are_not_read(monkeypatch, tmp_path):
    (tmp_path / "out" / "0").mkdir(parents=True)
    (tmp_path / "out" / "0" / "manifest.json").write_text('{"synthetic": {"t1c": {}}}')
    monkeypatch.setattr(cases, "load_study", lambda files, **_: files.case)
    studies = [StudyFiles(case, case, {}, (), ()) for case in "01"]
    for options, read in ((CohortSettings(), [None, "1"]), (AGAIN, ["0", "1"])):
        settings = replace(SETTINGS, targets=("t1c",))  # without, files that may be a scan would be looked for
        left, _ = turns_of(tmp_path, studies, options, settings)
        left.run.work._began = np.inf  # no manifest is of this run
        assert [study.result() for _, study in turns.read_ahead(left)] == read
        left.run.work.close()


def memory_of(monkeypatch, available):
    for module in (turns, main_memory):
        monkeypatch.setattr(module, "available_memory", lambda: available)
        monkeypatch.setattr(module, "reusable_memory", lambda: 0)


@pytest.mark.parametrize(("share", "said"), [(1.5, 1), (2.5, 0)])
def test_a_study_that_takes_more_than_half_of_the_memory_is_said(model, small, tmp_path, monkeypatch, share, said):
    needed = memory_needed(find_studies(small)[0].images(), model, SETTINGS)
    memory_of(monkeypatch, int(share * needed))
    listener = Listener()
    assert complete_cohort(small, tmp_path / "out", model, SETTINGS, display=listener).completed
    assert sum(line.startswith("Ann: needs about 0.0 GB of memory, 0.0 GB are") for line in listener.said) == said


@pytest.mark.parametrize(("room", "together"), [(1.6, 0), (2.5, 1)])
def test_two_studies_are_in_memory_only_if_both_fit(model, small, tmp_path, monkeypatch, room, together):
    for case in ("Bea", "Cal"):
        write_images(small, case, ("t1n", "t2w"))
    memory_of(monkeypatch, int(room * memory_needed(find_studies(small)[0].images(), model, SETTINGS)))
    before, alive = [], []

    def load(files, **settings):
        gc.collect()
        alive.append(sum(study() is not None for study in before))
        study = load_study(files, **settings)
        before.append(weakref.ref(study))
        return study

    monkeypatch.setattr(cases, "load_study", load)
    assert len(complete_cohort(small, tmp_path / "out", model, SETTINGS).completed) == 3
    assert alive == [0, together, together]
