"""What each page has: its folder, its scans, its job and its results; gone when the page is not heard of any more."""

import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossmr.app.jobs import Job
from crossmr.app.uploads import Limits, Refused, Store

FORGET_SECONDS = 300.0
"""A page that was not heard of for so long is taken for closed."""
LEAVE_SECONDS = 120.0
"""The same, of a page that said that it was being closed; it may only have been loaded anew."""
MAX_PAGES = 16
"""Pages at once."""


@dataclass(eq=False)
class Session:
    """One page, as long as it is open."""

    key: str
    """By which it is called; nobody can guess it."""
    folder: Path
    store: Store
    heard: float
    """When it was last heard of, in seconds of `time.monotonic`."""
    job: Job | None = None
    """What was asked for last."""
    choices: dict[str, str] = field(default_factory=dict)
    """What a user has corrected: file or series → contrast."""
    together: bool = False
    """Whether a user said that all files are of one study."""
    recognised: dict[str, Any] | None = None
    """What the scans were recognised as; see `worker.recognise`."""
    batches: list[Any] = field(default_factory=list)
    """What is completed, as the worker wants it."""
    results: dict[str, Any] | None = None
    """What was made; see `worker.complete`."""
    out: Path | None = None
    """Where they lie."""
    runs: int = 0
    """How many jobs there were; each writes to a folder of its own."""

    def new_folder(self, name: str) -> Path:
        """A folder for a job, which makes it."""
        self.runs += 1
        return self.folder / f"{name}-{self.runs}"

    def keep_only(self, folder: Path) -> None:
        """Delete what earlier jobs of the same name made."""
        for other in self.folder.glob(f"{folder.name.partition('-')[0]}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    @property
    def name(self) -> str:
        """What it is called in a list: by its studies."""
        cases = [case["case"] for case in (self.recognised or {}).get("cases", ())]
        return ", ".join(cases[:3]) + (", …" if len(cases) > 3 else "") or f"{len(self.store.names)} files"


class Sessions:
    """All pages."""

    def __init__(self, root: Path, limits: Limits):
        self.root, self.limits = root, limits
        self.all: dict[str, Session] = {}

    def make(self) -> Session:
        """A new page's.

        Raises:
            Refused: too many are open.
        """
        if len(self.all) >= MAX_PAGES:
            raise Refused(f"{MAX_PAGES} pages are open already. Close one of them.", 429)
        key = secrets.token_urlsafe(18)
        folder = self.root / f"page-{key}"
        (folder / "scans").mkdir(parents=True, mode=0o700)
        session = Session(key, folder, Store(folder / "scans", self.limits), time.monotonic())
        self.all[key] = session
        return session

    def find(self, key: str) -> Session:
        """The page of this key, which is heard of by that.

        Raises:
            Refused: there is none, or it was forgotten.
        """
        if (session := self.all.get(key)) is None:
            why = "it was deleted, or its page was not heard of for some minutes"
            raise Refused(f"This study is not here any more: {why}.", 404)
        session.heard = time.monotonic()
        return session

    def leave(self, key: str) -> None:
        """A page says that it is being closed; it is forgotten soon, unless it is heard of again."""
        if session := self.all.get(key):
            session.heard = time.monotonic() - FORGET_SECONDS + LEAVE_SECONDS

    def forget(self, session: Session) -> None:
        """Delete all that a page has."""
        self.all.pop(session.key, None)
        session.store.close()

    def unheard(self) -> list[Session]:
        """The pages that were closed, as far as one can tell."""
        return [one for one in self.all.values() if time.monotonic() - one.heard > FORGET_SECONDS]
