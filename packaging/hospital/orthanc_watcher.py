#!/usr/bin/env python3
r"""Hand every study that Orthanc has received to a module, and send the derived series back by DICOM.

Orthanc numbers whatever happens in it (REST /changes). This program asks for the numbers after the last one that it has
stored, waits until a study is stable, writes its acquired MR images into a folder as the router mercure does, runs a
command on it (by default `crossmr-mercure`) and sends the images that the command leaves to a DICOM node by `storescu`.
A study whose acquired images were handled before is not handled again: Orthanc keeps their fingerprint as metadata of
the study, so neither a study that is sent twice nor the derived series that arrive start anything.

    orthanc_watcher.py --state /var/lib/crossmr --to ORTHANC@127.0.0.1:4242 -- crossmr-mercure
    orthanc_watcher.py --state /var/lib/crossmr --to PACS@pacs:104 -- podman run --rm --network none --user 0 \
        -v {in}:/in:ro -v {out}:/out -e MERCURE_IN_DIR=/in -e MERCURE_OUT_DIR=/out crossmr

It needs Python 3.11 and dcmtk, nothing else. The log has Orthanc's identifiers of studies and counts, no patient data.
A study that fails leaves a note in STATE/notes; delete the note, and the study is tried again. Research use only.
"""

import argparse
import base64
import contextlib
import ctypes
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

MARK = 4747
"""Number of the metadata of a study that holds the fingerprint of what was handled; users' begin at 1024."""
OURS = "crossmr"
"""Manufacturer of derived series."""
ARRIVED = ("NewStudy", "StableStudy")
"""Changes after which a study is looked at; the first counts where Orthanc was restarted before the second."""
AT_ONCE = 1000
"""Changes that are asked for at a time."""
ATTEMPTS = 5
"""To send images, with twice the pause after each; and to get a study from Orthanc."""
OUTDATED = "Delete those derived series that are no longer true:"


class Failed(Exception):
    """A study that the module, or the node that is sent to, refused; its text is for the operator."""


class Orthanc:
    """Orthanc's REST interface."""

    def __init__(self, url: str, credentials: str | None = None):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise SystemExit(f"--orthanc is {url}; expected an address such as http://127.0.0.1:8042.")
        self.url = url.rstrip("/")
        self.headers = {}
        if credentials:
            self.headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()

    def ask(self, path: str, *, put: str | None = None) -> bytes:
        """What Orthanc answers; `put` is stored there."""
        data = None if put is None else put.encode()
        method = "GET" if put is None else "PUT"
        request = urllib.request.Request(self.url + path, data, self.headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def json(self, path: str) -> Any:
        """The object that Orthanc answers."""
        return json.loads(self.ask(path))

    def find(self, path: str) -> bytes | None:
        """As `ask`, or None where there is nothing."""
        try:
            return self.ask(path)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    state: Path
    to: str
    """TITLE@HOST:PORT of the node that derived series are sent to."""
    command: tuple[str, ...]
    settings: dict[str, Any]
    minutes: float = 60.0
    every: float = 5.0
    quiet: float = 60.0
    """Seconds without a new image after which a study is whole; Orthanc's own measure is lost when it restarts."""
    description: str = "*"
    """Pattern of the descriptions of the studies that are meant, in any case."""
    pause: float = 10.0
    """Seconds before images are sent again, the first time."""


class Watcher:
    """The studies that wait, those that failed, and the number of the last change: all of it in STATE/state.json."""

    def __init__(self, orthanc: Orthanc, options: Options):
        self.orthanc, self.options = orthanc, options
        self.notes, self.work = options.state / "notes", options.state / "work"
        self.errors: Counter[str] = Counter()
        for folder in (options.state, self.notes):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(options.state / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise SystemExit(f"Another watcher runs with {options.state}.") from None
        shutil.rmtree(self.work, ignore_errors=True)  # of one that was killed
        path = options.state / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        self.since: int | None = state.get("since")
        self.waiting = dict.fromkeys(state.get("waiting", ()))
        self.failed: dict[str, str] = state.get("failed", {})

    def close(self) -> None:
        """Let another watcher use the folder."""
        os.close(self._lock)

    def start(self, *, from_beginning: bool) -> None:
        """The first time: begin with what arrives from now on, unless all of the archive is wanted."""
        last = self.orthanc.json("/changes?last")["Last"]
        if self.since is None:
            self.since = 0 if from_beginning else last
        elif last < self.since:
            log("Orthanc's index is another one than before: only what arrives from now on is handled")
            self.since = last
        self.save()

    def round(self) -> None:
        """See what has arrived, and handle each study that is stable; one that is not, or fails to answer, waits."""
        self._listen()
        for study in [study for study in self.failed if not self._note(study).exists()]:
            log(f"{study}: its note was deleted, so it is tried again")
            del self.failed[study]
            self.waiting[study] = None
        self.save()
        for study in list(self.waiting):
            if self._try(study):
                del self.waiting[study]
        self.save()  # after a kill, those that were handled are found marked

    def save(self) -> None:
        """Write the state, whole or not at all."""
        temporary = self.options.state / "state.json.partial"
        with temporary.open("w") as file:
            json.dump({"since": self.since, "waiting": list(self.waiting), "failed": self.failed}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.options.state / "state.json")

    def _listen(self) -> None:
        done = False
        while not done:
            answer = self.orthanc.json(f"/changes?since={self.since}&limit={AT_ONCE}")
            for change in answer["Changes"]:
                self.since = change["Seq"]
                if change["ChangeType"] in ARRIVED:
                    self.waiting[change["ID"]] = None
            done = answer["Done"] or not answer["Changes"]

    def _try(self, study: str) -> bool:
        """Whether a study need not wait any longer: it was handled, or has failed."""
        mark = ""
        try:
            if (found := self.orthanc.find(f"/studies/{study}")) is None:
                return True  # deleted
            described = str(json.loads(found)["MainDicomTags"].get("StudyDescription", "")).lower()
            if not fnmatch.fnmatchcase(described, self.options.description.lower()):
                return True
            if not self._is_whole(json.loads(found)):
                return False
            images, derived, mark = self._images(study)
            before = (self.orthanc.find(f"/studies/{study}/metadata/{MARK}") or b"").decode()
            if not images or mark in (before, self.failed.get(study)):
                return True
            log(f"{study}: {len(images)} images")
            return self._handle(study, images, derived, mark)
        except Failed as error:
            return self._fail(study, str(error), mark)
        except urllib.error.HTTPError as error:  # Orthanc answers, but not this; the other studies go on
            self.errors[study] += 1
            log(f"{study}: Orthanc answers {error.code}, for the {self.errors[study]}. time")
            why = f"Orthanc cannot give its images: it answers {error.code}. See Orthanc's log."
            return self.errors[study] >= ATTEMPTS and self._fail(study, why, mark)

    def _is_whole(self, study: dict[str, Any]) -> bool:
        """Whether no image of a study has arrived for a while."""
        latest = datetime.strptime(study["LastUpdate"], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        return study["IsStable"] is True and (datetime.now(UTC) - latest).total_seconds() >= self.options.quiet

    def _handle(self, study: str, images: dict[str, str], derived: set[str], mark: str) -> bool:
        """Complete a study, send what was derived and mark it; whether it need not wait any longer."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(mode=0o700)
        try:
            outgoing, result = self._run(study, images)
            if self._images(study)[2] != mark:
                log(f"{study}: images arrived meanwhile, so it waits again")
                return False
            series = {path.name.partition("#")[0] for path in outgoing.glob("*.dcm")}
            if series:
                self._send(outgoing)
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        self.orthanc.ask(f"/studies/{study}/metadata/{MARK}", put=mark)
        log(f"{study}: {result.get('status', 'done')}; {len(series)} series sent")
        self._settle(study)
        message, notes = result.get("__mercure_notification", {}), []
        if message.get("requested") and not series:
            notes.append(message["text"])
        if outdated := derived - series:
            notes.append(f"It was handled again, for images have arrived. {OUTDATED} {', '.join(sorted(outdated))}.")
        if notes:
            log(f"{study}: there is something to know; see {self._note(study)}")
            self._leave_note(study, "\n".join(notes))
        return True

    def _fail(self, study: str, why: str, mark: str) -> bool:
        """Leave a note of a study that failed, which then need not wait any longer."""
        log(f"{study}: failed; see {self._note(study)}")
        self._leave_note(study, f"{why}\nTo try it again, delete this file.")
        self.failed[study] = mark
        self.save()
        return True

    def _settle(self, study: str) -> None:
        """Forget earlier failures of a study, and its note."""
        self.errors.pop(study, None)
        self.failed.pop(study, None)
        with contextlib.suppress(FileNotFoundError):
            self._note(study).unlink()

    def _images(self, study: str) -> tuple[dict[str, str], set[str], str]:
        """The acquired MR images of a study, each with its series; UIDs of the derived series; the images' mark."""
        images: dict[str, str] = {}
        derived: set[str] = set()
        for series in self.orthanc.json(f"/studies/{study}/series"):
            tags = series["MainDicomTags"]
            if tags.get("Manufacturer") == OURS:
                derived.add(tags["SeriesInstanceUID"])
            elif tags.get("Modality") == "MR":
                images |= dict.fromkeys(series["Instances"], series["ID"])
        return images, derived, hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()

    def _run(self, study: str, images: dict[str, str]) -> tuple[Path, dict[str, Any]]:
        """Run the module on a study; returns the folder of what it derived, and its result.json."""
        incoming, outgoing, temporary = (self.work / name for name in ("in", "out", "tmp"))
        for folder in (incoming, outgoing, temporary):
            folder.mkdir(mode=0o700)
        for image, series in images.items():
            (incoming / f"{series}#{image}.dcm").write_bytes(self.orthanc.ask(f"/instances/{image}/file"))
        (incoming / "task.json").write_text(json.dumps({"id": study, "process": {"settings": self.options.settings}}))
        words = [word.replace("{in}", str(incoming)).replace("{out}", str(outgoing)) for word in self.options.command]
        folders = {"MERCURE_IN_DIR": str(incoming), "MERCURE_OUT_DIR": str(outgoing), "TMPDIR": str(temporary)}
        end = self._call(words, {**os.environ, **folders}, 60 * self.options.minutes)
        try:
            result = json.loads((outgoing / "result.json").read_text())
        except (OSError, ValueError):
            result = {}
        if end is None:
            raise Failed(f"The module was stopped after {self.options.minutes:g} minutes (--minutes).")
        if end != 0:
            raise Failed(result.get("error") or f"The module ended with exit code {end} and left no result.json.")
        return outgoing, result

    def _send(self, folder: Path) -> None:
        """Send a folder's images by C-STORE, again if need be."""
        title, _, place = self.options.to.partition("@")
        host, _, port = place.rpartition(":")
        words = ["storescu", "-aet", "CROSSMR", "-aec", title, "+sd", "+sp", "*.dcm", host, port, str(folder)]
        for attempt in range(ATTEMPTS):
            if self._call(words, None, 600) == 0:
                return
            if attempt < ATTEMPTS - 1:
                time.sleep(self.options.pause * 2**attempt)
        raise Failed(f"The series could not be sent to {self.options.to}. See that it listens and accepts CROSSMR.")

    @staticmethod
    def _call(words: list[str], environment: dict[str, str] | None, seconds: float) -> int | None:
        """The exit code of a command, None if it took too long; what it prints may name patients and is dropped."""
        try:
            process = subprocess.Popen(
                words,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise Failed(f"{words[0]} cannot be run: {error.strerror}.") from None
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _note(self, study: str) -> Path:
        return self.notes / f"{study}.txt"

    def _leave_note(self, study: str, text: str) -> None:
        address = f"{self.orthanc.url}/app/explorer.html#study?uuid={study}"
        self._note(study).write_text(f"{now()}\nThe study: {address}\n{text}\n")


def die_with_parent() -> None:
    """Have Linux end this process, a module, when the watcher is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def now() -> str:
    """The time, to the second."""
    return datetime.now().isoformat(" ", "seconds")


def log(text: str) -> None:
    """One line."""
    print(f"{now()} {text}", flush=True)


def parse(arguments: list[str] | None) -> tuple[Orthanc, Options, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orthanc", default="http://127.0.0.1:8042", help="address of its REST interface")
    parser.add_argument("--credentials", type=Path, help="file that holds USER:PASSWORD")
    parser.add_argument("--to", required=True, metavar="TITLE@HOST:PORT", help="DICOM node of the derived series")
    parser.add_argument("--state", required=True, type=Path, help="folder of this program alone")
    parser.add_argument("--settings", type=Path, help="JSON file with the module's settings")
    parser.add_argument("--description", default="*", metavar="GLOB", help="only studies of such a StudyDescription")
    parser.add_argument("--minutes", type=float, default=60, help="that the module may take for a study")
    parser.add_argument("--every", type=float, default=5, help="seconds between questions to Orthanc")
    parser.add_argument("--quiet", type=float, default=60, help="seconds without a new image: the study is whole")
    parser.add_argument("--pause", type=float, default=10, help="seconds before series are sent again")
    parser.add_argument("--from-beginning", action="store_true", help="the first time: all studies of the archive")
    parser.add_argument(
        "command", nargs="*", default=["crossmr-mercure"], help="the module; {in} and {out} are folders"
    )
    given = parser.parse_args(arguments)
    title, _, place = given.to.partition("@")
    if not title or not place.rpartition(":")[0] or not place.rpartition(":")[2].isdigit():
        parser.error(f"--to is {given.to}; expected TITLE@HOST:PORT, such as ORTHANC@127.0.0.1:4242")
    credentials = given.credentials.read_text().strip() if given.credentials else None
    settings = json.loads(given.settings.read_text()) if given.settings else {}
    command = tuple(given.command)
    seconds = {"every": given.every, "quiet": given.quiet, "pause": given.pause}
    options = Options(given.state, given.to, command, settings, given.minutes, description=given.description, **seconds)
    return Orthanc(given.orthanc, credentials), options, given


def main(arguments: list[str] | None = None) -> None:
    """Watch until stopped; while Orthanc does not answer, ask again."""
    os.umask(0o077)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that folders are removed and the module is stopped
    orthanc, options, given = parse(arguments)
    watcher = Watcher(orthanc, options)
    started, fault = False, ""
    while True:
        try:
            if not started:
                watcher.start(from_beginning=given.from_beginning)
                started = True
                log(f"watching, after change {watcher.since}, {len(watcher.waiting)} waiting")
            watcher.round()
            if fault:
                log("Orthanc answers again")
            fault = ""
        except (OSError, ValueError, KeyError, HTTPException) as error:  # among them URLError: Orthanc restarts
            if fault != (fault := f"{type(error).__name__} {getattr(error, 'code', '')}".strip()):
                log(f"Orthanc, or the folder {options.state}, fails ({fault}); it is tried again until it does not")
        time.sleep(options.every)


if __name__ == "__main__":
    main()
