"""The studies of a run, one after the other: each claimed, converted where it is DICOM, and read ahead."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from crossmr.completion.case import Run, images_of, is_finished, read_case, redo_reason_of_case
from crossmr.completion.ownership import why_not_kept, why_not_undone
from crossmr.completion.private import SCANS
from crossmr.completion.study import check_memory, memory_needed
from crossmr.completion.work import ATTEMPTS
from crossmr.data.naming import StudyFiles
from crossmr.data.study import Study
from crossmr.dicom.convert import Scans, other_series
from crossmr.errors import CrossmrError, OutputError
from crossmr.files import read_json
from crossmr.main_memory import available_memory, reusable_memory
from crossmr.parts import POLL_SECONDS, Claim


@dataclass(eq=False)
class Turn:
    """A study whose turn it is."""

    files: StudyFiles
    claim: Claim | None = None
    """None of a study that was finished before."""
    scans: Scans | None = None
    """What it was converted from, if it was DICOM."""
    finished: bool = False
    """Whether it was finished before and is not read."""


@dataclass(eq=False)
class Turns:
    """The studies that are left to this process; those that others have now come last."""

    run: Run
    fail: Callable[[str, str], None]
    """Called with a case and why it is not completed."""
    left: deque[str] = field(init=False)
    """Cases whose turn has not come."""
    started: float = field(init=False)
    """When, by the clock that stamps the failures."""

    def __post_init__(self) -> None:
        self.started = self.run.work.claims.now() if self.run.options.retry_failed else 0.0
        inputs = self.run.inputs
        self.left = deque(inputs.cases)

    def next(self, *, patient: bool) -> Turn | None:
        """The next study; None where none is left, or, unless patient, where others have all that are left."""
        while self.left:
            for _ in range(len(self.left)):
                case = self.left.popleft()
                if why := self._failed(case):
                    self.fail(case, why)
                elif isinstance(turn := self._begin(case), Turn):
                    return turn
                elif turn:
                    self.left.append(case)
            if not self.left or not patient:
                return None
            if self.run.work.is_over():
                self.left.clear()
            else:
                time.sleep(POLL_SECONDS)
        return None

    def _failed(self, case: str) -> str:
        """Why a case is not tried."""
        if why := self.run.inputs.faults.get(case):
            return why
        if self.run.options.part is None:
            return ""
        return self.run.work.failure(case, self.started)

    def _begin(self, case: str) -> Turn | bool:
        """The study, claimed; True where another process has it, False where it has failed."""
        files = self.run.inputs.by_case.get(case)
        if files is not None and self._is_finished(files):
            return Turn(files, finished=True)
        if (claim := self.run.work.claims.take(case)) is None:
            return True
        if claim.attempt >= ATTEMPTS and not self.run.options.retry_failed:
            why = f"{case}: {claim.attempt} processes died with it, perhaps of too little memory; see --retry-failed"
        elif files is not None:
            if self._is_finished(files):  # by another, just before it was claimed
                self.run.work.claims.give_back(claim)
                return Turn(files, finished=True)
            return Turn(files, claim)
        else:
            turn, why = self._convert(case, claim)
            if turn is not None:
                return turn
        self.fail(case, why)
        self.run.work.claims.give_back(claim)
        return False

    def _convert(self, case: str, claim: Claim) -> tuple[Turn | None, str]:
        """A study of DICOM as NIfTI, or why it is not."""
        run, place = self.run, self.run.layout.records / SCANS
        if is_finished(run, case):
            manifest = read_json(run.layout.folder(case) / "manifest.json", OutputError)
            if undone := run.inputs.undone(manifest, case):
                return None, why_not_undone(case, undone)
            others = other_series(case, (run.inputs.series or {})[case], place)
            if others and not run.inputs.chosen_since(manifest, case):
                return None, why_not_kept(case, others)
        files, scans = run.inputs.convert(case, place, keep_names=run.options.keep_names)
        for line in scans.lines():
            run.display.say(line)
        if scans.refused:
            return None, scans.refused
        return Turn(files, claim, scans, finished=self._is_finished(files)), ""

    def _is_finished(self, files: StudyFiles) -> bool:
        try:
            return is_finished(self.run, files.case) and not redo_reason_of_case(self.run, files)
        except CrossmrError:  # which is said when the case is completed
            return False


def read_ahead(turns: Turns) -> Iterator[tuple[Turn, Future[Study | None]]]:
    """Every study with its volumes.

    A study is read while the one before it is completed, if there is memory for both; a study that takes more memory
    than there is fails with StudyError.
    """
    run = turns.run

    def load(turn: Turn) -> Study | None:
        return None if turn.finished else read_case(run, turn.files)

    def load_alone(turn: Turn) -> Study | None:
        case, images = turn.files.case, images_of(turn.files)
        if not turn.finished and (warning := check_memory(case, images, run.model, run.settings)):
            run.display.say(warning)
        return load(turn)

    def needed(turn: Turn) -> int:
        return 0 if turn.finished else memory_needed(images_of(turn.files), run.model, run.settings)

    with ThreadPoolExecutor(1) as reader:
        turn, following = turns.next(patient=True), None
        while turn is not None:
            study: Future[Study | None] = following or reader.submit(load_alone, turn)
            wait([study])  # one study ahead, not more: memory
            following, after = None, turns.next(patient=False)
            if after is not None and needed(turn) + needed(after) <= available_memory() + reusable_memory():
                following = reader.submit(load, after)
            yield turn, study
            del study  # before the next one is read
            turn = after or turns.next(patient=True)
