"""The models at hand: those shipped with the package, and those imported from a file.

An exported model is a zip of its folder. Nothing is ever fetched: a file is what goes through a hospital's firewall.
"""

import io
import lzma
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import typer

from crossmr.errors import ModelError, OutputError
from crossmr.files import write_atomically
from crossmr.model import CrossConditionedModel, load_model

SHIPPED = Path(__file__).parent / "weights"
DEFAULT = "default"
"""The model that is used where none is named."""
LARGEST = 2**31
"""Bytes at most of a model that is imported."""
_FILE = re.compile(r"config\.json|[a-z0-9_-]+\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Known:
    """A model at hand."""

    name: str
    folder: Path
    shipped: bool


def home() -> Path:
    """Where imported models live: $CROSSMR_HOME/models, or the user's folder for applications' data."""
    return Path(os.environ.get("CROSSMR_HOME") or typer.get_app_dir("crossmr")) / "models"


def known_models() -> dict[str, Known]:
    """All models at hand, by name; the shipped ones first."""
    found: dict[str, Known] = {}
    for root, shipped in ((SHIPPED, True), (home(), False)):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if (folder / "config.json").exists():
                found.setdefault(folder.name, Known(folder.name, folder, shipped))
    return found


def find_model(model: Path | str | None = None) -> Path:
    """The folder of a model: one given as a folder, one at hand by its name, or the default.

    Raises:
        ModelError: neither a folder nor a name that is at hand.
    """
    known = known_models()
    if model is None:
        if DEFAULT not in known:
            raise ModelError("This crossmr has no default model. Name one with --model, or train one.")
        return known[DEFAULT].folder
    if str(model) in known and not os.path.exists(Path(model) / "config.json"):
        return known[str(model)].folder
    if not os.path.exists(model) and _NAME.fullmatch(str(model)):
        raise ModelError(f"'{model}' is neither a folder nor a model at hand; these are: {', '.join(known) or 'none'}.")
    return Path(model)


def import_model(source: Path, name: str | None = None) -> Known:
    """Check an exported model, or a model's folder, and keep it under a name: by default the file's.

    Raises:
        ModelError: it is no model, damaged, or holds anything but a model's files.
        OutputError: the name is taken, or nothing can be written.
    """
    name = name or source.name.removesuffix(".zip")
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"'{name}' is no name for a model; wanted letters, digits, '.', '_' and '-'; choose with --name."
        )
    if name in known_models():
        raise OutputError(f"There is a model '{name}' already; choose another with --name.")
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home(), prefix=".import-") as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            for file, content in _contents(source).items():
                (folder / file).write_bytes(content)
            try:
                load_model(folder)
            except ModelError as error:
                raise ModelError(f"{source}: {str(error).replace(f'{folder}{os.sep}', '')}") from error
            os.replace(folder, home() / name)
    except OSError as error:
        raise OutputError(
            f"{home()} could not be written: {error.strerror or error}. Check free space and permissions."
        ) from error
    return Known(name, home() / name, False)


def export_model(model: Path | str, target: Path) -> CrossConditionedModel:
    """Check a model and write it to one zip file.

    Raises:
        ModelError: there is no such model, or it is damaged. OutputError: the file exists or cannot be written.
    """
    if target.exists():
        raise OutputError(f"{target} exists; name another file.")
    folder = find_model(model)
    loaded = load_model(folder)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for file, content in sorted(_contents(folder).items()):
            archive.writestr(zipfile.ZipInfo(file), content)  # no dates: the same model, the same bytes
    write_atomically(target, packed.getvalue())
    return loaded


def remove_model(name: str) -> None:
    """Delete an imported model.

    Raises:
        ModelError: there is none of this name, or it is shipped with the package. OutputError: it cannot be deleted.
    """
    known = known_models()
    found = known.get(name)
    if found is None or found.shipped:
        imported = ", ".join(name for name, one in known.items() if not one.shipped) or "none"
        shipped = " but shipped with crossmr" if found else ""
        raise ModelError(f"'{name}' is no imported model{shipped}; these are: {imported}.")
    try:
        if found.folder.is_symlink():
            found.folder.unlink()
        else:
            shutil.rmtree(found.folder)
    except OSError as error:
        raise OutputError(f"{found.folder} could not be removed: {error.strerror or error}.") from error


def _contents(source: Path) -> dict[str, bytes]:
    """The files of a model's folder or zip; anything but flat names of a model's files is refused unread."""
    try:
        if source.is_dir():
            return {path.name: path.read_bytes() for path in source.iterdir() if _FILE.fullmatch(path.name)}
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            if strange := [entry.filename for entry in entries if not _FILE.fullmatch(entry.filename)]:
                raise ModelError(f"{source} holds {strange[0]!r}, which is no file of a model. Do not use it.")
            if len({entry.filename for entry in entries}) < len(entries):
                raise ModelError(f"{source} holds a file twice. Do not use it.")
            if sum(entry.file_size for entry in entries) > LARGEST:
                raise ModelError(f"{source} would unpack to more than {LARGEST >> 30} GiB. Do not use it.")
            return {entry.filename: archive.read(entry) for entry in entries}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{source} cannot be read as an exported model: {reason}. Copy it again.") from error
