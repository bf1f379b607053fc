"""What is left to do of a run, as several processes see it that complete one cohort into one output.

It lies in the hidden folder `.crossmr` of the records while the run lasts: run.json, the lists of studies, the claims
of those who work, what failed, and which parts are done. Whoever finishes last deletes it; manifest.json has it all.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from crossmr.completion.inputs import Inputs
from crossmr.completion.layout import FORMAT, PROFILES, Layout, records_of
from crossmr.completion.listing import read_cases, read_listing, write_listing
from crossmr.completion.ownership import say_gone
from crossmr.errors import OutputError
from crossmr.files import digest, is_record, read_json, remove, write_json
from crossmr.parts import POLL_SECONDS, WORK, Claims, Holder, Part, note_done

RUN = "crossmr-run"
SHARED = "shared"
"""The key of a run in which each call completes studies of its own."""
LOOKING = 16
"""Threads that look whether finished studies are still there."""
ATTEMPTS = 3
"""A study with which so many processes died has failed."""
_LISTING, FINISH, PATHS = ".list", ".finish", ".paths"
"""What is claimed beside the cases."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    finished: bool
    studies: int
    done: int
    failed: dict[str, str]
    """Case → why."""
    running: list[Holder]
    """Who works on which case."""
    dead: list[Holder]
    """Cases whose process is gone; another one takes them over."""
    per_hour: float
    """Studies that were done per hour since the run began; 0 where nothing is known."""
    gone: dict[str, list[str]]
    """Case that was finished before → its files that are not there any more; it is left to do."""

    @property
    def left(self) -> int:
        """Studies that nobody has begun."""
        return max(0, self.studies - self.done - len(self.failed) - len(self.running))

    def lines(self) -> list[str]:
        """What a user reads of it."""
        told = f"{self.done} done, {len(self.running)} running, {len(self.failed)} failed, {self.left} left"
        left = self.left + len(self.running)
        if left and self.per_hour:
            told += f"; {self.per_hour:.3g} per hour, about {_span(left / self.per_hour)} left"
        said = [f"{self.studies} {'study' if self.studies == 1 else 'studies'}: {told}"]
        said += [f"{case} failed: {reason}" for case, reason in self.failed.items()]
        said += [f"{case}: {say_gone(files)}, so it is done again" for case, files in self.gone.items()]
        said += [
            f"{one.item} is running on {one.host}, process {one.process}, for {one.seconds:.0f} s"
            for one in self.running
        ]
        said += [
            f"{one.item}: its process {one.process} on {one.host} is gone; the next one takes it" for one in self.dead
        ]
        if not self.finished and not self.running:
            said.append("Nobody works on it. The same command goes on where it stopped.")
        return said


def _span(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def find_run(out: Path) -> Layout | None:
    """The layout of an output where a run has begun and not finished."""
    for profile in PROFILES:
        layout = Layout(out, profile)
        run = layout.records / WORK / "run.json"
        if run.exists() and read_json(run, OutputError).get("profile") == profile:
            return layout
    return None


def read_progress(out: Path) -> Progress:
    """How far the run of an output is; nothing is written, and nobody is waited for.

    Raises:
        OutputError: `complete` did not write it.
    """
    if (layout := find_run(out)) is not None:
        return Work(layout).progress()
    records = records_of(out)
    if not is_record(records / "manifest.json", FORMAT):
        raise OutputError(
            f"{out} is not an output of 'crossmr complete': it has no manifest.json. Name another folder."
        )
    told = read_json(records / "manifest.json", OutputError)
    failed, done = told.get("failed", {}), {*told.get("verdicts", {})} - {*told.get("failed", {})}
    gone, finished = _gone(Layout(out, told.get("profile", "labelled")), done), bool(told.get("finished"))
    left = len(done) - len(gone)
    return Progress(finished and not gone, len(done) + len(failed), left, dict(failed), [], [], 0.0, gone)


class Work:
    """The work of one process, and what the others of its run have done and left."""

    def __init__(self, layout: Layout, part: Part | None = None, *, overwrite: bool = False) -> None:
        self.part = part or Part(1, 1)
        self._overwrites = overwrite
        self._layout = layout
        self._folder = layout.records / WORK
        self.claims = Claims(self._folder / "claims")
        self._run, self._key, self._began = "", "", 0.0
        if (self._folder / "run.json").exists():
            self._remember()

    # The run

    def begin(self, inputs: Inputs) -> None:
        """Begin a run of one process, in an output that is locked; what an earlier one left is forgotten.

        Raises:
            OutputError: other processes are at work there, where the file system has no locks.
        """
        if alive := self.others():
            raise _in_use(self._layout.out, alive)
        remove(self._folder)
        self._start("", inputs)

    def join(self, key: str, find: Callable[[], Inputs]) -> Inputs:
        """The studies of this process's part, of a run that others may have begun.

        Whoever comes first lists all studies, by `find`, and begins the run; the others wait for the list.

        Args:
            key: what all processes of a run have in common: the cohort and the options.
            find: lists the studies.

        Raises:
            OutputError: other processes work here on another cohort, or with other options.
        """
        self._join(key, find)
        return read_listing(self._listing(), self.part)

    def listed(self, key: str) -> Inputs | None:
        """The studies of this process's part, of a run that others have begun; None where nobody has."""
        return read_listing(self._listing(), self.part) if self._is_begun(key) else None

    def share(self, inputs: Inputs) -> None:
        """Join, or begin, a run into which each call completes studies of its own; it ends with the last of them."""
        self._join(SHARED, lambda: Inputs(inputs.root))
        path = self._folder / f"studies-{digest(chr(10).join(inputs.cases))[:16]}.jsonl"
        write_listing(path, inputs)
        self._began = path.stat().st_mtime

    def join_alone(self, key: str, root: Path) -> None:
        """Join a run of which every part lists its own studies, or begin it; see `add`."""
        self._join(key, lambda: Inputs(root))

    def add(self, inputs: Inputs) -> None:
        """List the studies of this part alone."""
        write_listing(self._folder / f"studies-{self.part.number}-of-{self.part.of}.jsonl", inputs)

    def _join(self, key: str, find: Callable[[], Inputs]) -> None:
        while not self._is_begun(key):
            claim = self.claims.take(_LISTING)
            if claim is None:
                time.sleep(POLL_SECONDS)
                continue
            try:
                if not self._is_begun(key):
                    if (alive := self.others()) and not (key == SHARED and self.is_over()):
                        raise _in_use(self._layout.out, alive)
                    self._start(key, find())
            finally:
                self.claims.give_back(claim)
        self._remember()

    def _start(self, key: str, inputs: Inputs) -> None:
        for path in (self._folder / "run.json", *self._folder.glob("studies*")):
            remove(path)
        for name in ("failed", "parts", "patients"):
            remove(self._folder / name)
        write_listing(self._listing(), inputs)
        failed = self.failed_before() if key == SHARED else {}
        begun = {"format": FORMAT, "finished": False, "profile": self._layout.profile, "failed": failed}
        write_json(self._layout.records / "manifest.json", begun)
        self._layout.start(inputs.root)
        identity = {"format": RUN, "key": key, "id": f"{time.time_ns():x}"}
        options = {"profile": self._layout.profile, "overwrite": self._overwrites}
        write_json(self._folder / "run.json", {**identity, **options})
        self._remember()

    def _remember(self) -> None:
        path = self._folder / "run.json"
        run = read_json(path, OutputError)
        self._run, self._key, self._overwrites = run["id"], run["key"], run["overwrite"]
        self._began = path.stat().st_mtime

    def _is_begun(self, key: str) -> bool:
        """Whether a run of this kind has begun and not finished."""
        manifest, run = self._layout.records / "manifest.json", self._folder / "run.json"
        if not all(path.exists() for path in (manifest, run, self._listing())):
            return False
        if read_json(run, OutputError).get("key") != key:
            return False
        return key == SHARED or not read_json(manifest, OutputError).get("finished")

    @property
    def is_shared(self) -> bool:
        """Whether each call completes studies of its own in this run."""
        return self._key == SHARED

    def others(self) -> list[Holder]:
        """The living processes that have claimed something, without this one's claims."""
        return [one for one in self.claims.holders() if one.alive and one.item not in self.claims.mine]

    def is_over(self) -> bool:
        """Whether others have finished the run meanwhile, or begun another."""
        path = self._folder / "run.json"
        return not path.exists() or read_json(path, OutputError).get("id") != self._run

    def is_of_this_run(self, manifest: Path) -> bool:
        """Whether a case was finished since the run began."""
        return (at := _written(manifest)) > 0 and at >= self._began

    # Its cases

    def record_failure(self, case: str, reason: str) -> None:
        """Note why a case failed, in words that may be shared."""
        write_json(self._folder / "failed" / f"{case}.json", {"case": case, "reason": reason})

    def failure(self, case: str, since: float = 0.0) -> str:
        """Why a case failed in this run, '' if it did not, or before `since`."""
        path = self._folder / "failed" / f"{case}.json"
        if not path.exists() or path.stat().st_mtime < since:
            return ""
        return str(read_json(path, OutputError)["reason"])

    def forget_failure(self, case: str) -> None:
        """Of a case that is completed now."""
        remove(self._folder / "failed" / f"{case}.json")

    # Its end

    def progress(self) -> Progress:
        """How far the run is; see `read_progress`."""
        cases, failed, again = self.cases(), self.failures(), self._overwrites
        written = {case: _written(self._layout.folder(case) / "manifest.json") for case in cases - failed.keys()}
        now = {case for case, at in written.items() if at and at >= self._began}
        before = {case for case, at in written.items() if at} - now
        gone = {} if again else _gone(self._layout, before)
        done = now if again else now | (before - gone.keys())
        holders = [one for one in self.claims.holders() if one.item in cases - done - failed.keys()]
        hours = max(1e-9, (time.time() - self._began) / 3600)
        return Progress(
            finished=False,
            studies=len(cases),
            done=len(done),
            failed=failed,
            running=[one for one in holders if one.alive],
            dead=[one for one in holders if not one.alive],
            per_hour=len(now) / hours,
            gone=gone,
        )

    def is_last(self) -> bool:
        """Note that this part is done; whether it is the last one, and nobody works any more."""
        if self.is_over():
            return False
        folder, all_done = self._folder / "parts", False
        try:
            all_done = note_done(folder, self.part)
        except OutputError:
            if not self.is_over():
                raise
        if self.is_over():  # just now
            if not (self._folder / "run.json").exists():
                remove(folder)
            return False
        return all_done and not self.others()

    def cases(self) -> set[str]:
        """All cases of the run."""
        return {case for path in self._folder.glob("studies*.jsonl") for case in read_cases(path)}

    def failures(self) -> dict[str, str]:
        """Case → why it failed."""
        folder = self._folder / "failed"
        entries = (read_json(path, OutputError) for path in sorted(folder.glob("*.json")))
        return {str(entry["case"]): str(entry["reason"]) for entry in entries}

    def failed_before(self) -> dict[str, str]:
        """Case → why it failed, of calls before this run that shared OUT, unless it was finished or tried again since.

        Each call completes studies of its own, so what an earlier one said is still so.
        """
        path = self._layout.records / "manifest.json"
        failed = read_json(path, OutputError).get("failed", {}) if path.exists() else {}
        again = self.cases()
        return {
            case: why
            for case, why in failed.items()
            if case not in again and not (self._layout.folder(case) / "manifest.json").exists()
        }

    def end(self) -> None:
        """Delete what only matters while the run lasts."""
        remove(self._folder)

    def close(self) -> None:
        """Give back what this process has claimed."""
        self.claims.close()

    def _listing(self) -> Path:
        return self._folder / "studies.jsonl"


def _gone(layout: Layout, cases: Iterable[str]) -> dict[str, list[str]]:
    """Case → its files that are not there any more, of these finished ones: their manifests, or what these name."""

    def look(case: str) -> list[str]:
        try:
            return layout.gone(case, read_json(layout.folder(case) / "manifest.json", OutputError))
        except OutputError:
            return ["manifest.json"]

    order = sorted(cases)
    with ThreadPoolExecutor(LOOKING) as pool:  # which a disk elsewhere answers faster than one after the other
        found = dict(zip(order, pool.map(look, order), strict=True))
    return {case: names for case, names in found.items() if names}


def _written(path: Path) -> float:
    """When a file was written, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _in_use(out: Path, holders: Sequence[Holder]) -> OutputError:
    where = f"process {holders[0].process} on {holders[0].host}"
    return OutputError(
        f"{out} is being written to by other processes of crossmr ({where} and {len(holders) - 1} more), with another "
        "cohort or other options. Wait for them, or name another folder."
    )
