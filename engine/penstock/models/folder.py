"""The model folder: DIR/<name>/<version>/model.{onnx,txt,json,ubj}, and what a reference to it means (control path).

`name@version` or `name@alias`; aliases are in DIR/<name>/aliases.json (`{"champion": "2"}`). Versions are numbers or
dotted numbers and are ordered as numbers: 10 comes after 9. A reference resolves to one file, named by its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import msgspec

from ..errors import PenstockError

__all__ = [
    "SUFFIXES",
    "ModelError",
    "ResolvedModel",
    "aliases",
    "is_name",
    "is_version",
    "model_file",
    "models",
    "resolve",
    "set_alias",
    "version_key",
    "versions",
]

SUFFIXES = (".onnx", ".txt", ".json", ".ubj")

MOST_NAME = 200  # characters: file systems take 255 bytes
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"\d+(\.\d+)*")


class ModelError(PenstockError, ValueError):
    """A model that does not exist or cannot be loaded: which, where, and what there is instead."""


class ResolvedModel(msgspec.Struct, frozen=True):
    """One model file: its name, version, path, and the sha256 of its bytes in hexadecimal."""

    name: str
    version: str
    path: Path
    sha256: str

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


def models(root: str | os.PathLike[str]) -> list[str]:
    """Names of the models in the folder that have a version, sorted."""
    folder = Path(root)
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and versions(root, entry.name))


def versions(root: str | os.PathLike[str], name: str) -> list[str]:
    """Versions of a model, oldest first, by number."""
    folder = Path(root) / name
    if not _NAME.fullmatch(name) or not folder.is_dir():
        return []
    found = [entry.name for entry in folder.iterdir() if entry.is_dir() and _VERSION.fullmatch(entry.name)]
    return sorted(found, key=version_key)


def aliases(root: str | os.PathLike[str], name: str) -> dict[str, str]:
    """Aliases of a model and the version each stands for. Raises ModelError where aliases.json is damaged."""
    path = Path(root) / name / "aliases.json"
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise ModelError(f'{path}: expected an object such as {{"champion": "2"}}')
    for alias, version in table.items():
        if isinstance(version, bool) or not isinstance(version, (str, int)):
            raise ModelError(f"{path}: alias {alias!r} should be a version, got {version!r}")
        if not _NAME.fullmatch(alias) or _VERSION.fullmatch(alias):
            raise ModelError(f"{path}: {alias!r} is no name for an alias; start it with a letter")
    return {alias: str(version) for alias, version in table.items()}


def set_alias(root: str | os.PathLike[str], name: str, alias: str, version: str) -> None:
    """Point an alias at a version that exists. The file is replaced whole, so that a reader sees the old or the new."""
    if version not in versions(root, name):
        raise ModelError(f"model {name} has no version {version!r}; {_there_is(root, name)}")
    if not _NAME.fullmatch(alias) or _VERSION.fullmatch(alias):
        raise ModelError(f"{alias!r} is no name for an alias; start it with a letter")
    table = aliases(root, name) | {alias: version}
    path = Path(root) / name / "aliases.json"
    temporary = path.with_name(f".aliases.{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def resolve(root: str | os.PathLike[str], ref: str) -> ResolvedModel:
    """The model file that `name@version` or `name@alias` means now. Raises ModelError and lists what exists."""
    name, at, wanted = ref.partition("@")
    if not at or not name or not wanted:
        raise ModelError(f"model {ref!r}: expected name@version or name@alias; {_there_is(root, name)}")
    if not _NAME.fullmatch(name) or not _NAME.fullmatch(wanted):
        raise ModelError(f"model {ref!r}: names are letters, digits, '_', '-' and '.'; {_there_is(root, '')}")
    known = versions(root, name)
    version = wanted
    if wanted not in known:
        table = aliases(root, name)
        if wanted not in table:
            raise ModelError(f"model {ref!r} is not in {os.fspath(root)}: {_there_is(root, name)}")
        version = table[wanted]
        if version not in known:
            raise ModelError(f"model {ref!r}: alias {wanted} means version {version}, but {_there_is(root, name)}")
    path = model_file(Path(root) / name / version, ref)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model {ref!r}: cannot read {path}: {error.strerror}") from None
    return ResolvedModel(name, version, path, digest)


def model_file(folder: Path, ref: str) -> Path:
    """The one model file of a version's folder. Raises ModelError where there is none, or several."""
    try:
        # Only files: to open a pipe would wait for its other end.
        files = sorted(
            path for path in folder.iterdir() if path.stem == "model" and path.suffix in SUFFIXES and path.is_file()
        )
        if len(files) != 1:
            held = ", ".join(
                path.name.encode(errors="backslashreplace").decode() + ("" if path.is_file() else " (no file)")
                for path in sorted(folder.iterdir())[:20]
            )
            raise ModelError(
                f"model {ref!r}: expected one of model{', model'.join(SUFFIXES)} in {folder}, found {held or 'nothing'}"
            )
    except OSError as error:
        raise ModelError(f"model {ref!r}: cannot read {folder}: {error.strerror}") from None
    return files[0]


def is_name(name: str) -> bool:
    """Whether a text can name a model: no path can be made of it."""
    return len(name) <= MOST_NAME and bool(_NAME.fullmatch(name))


def is_version(version: str) -> bool:
    return len(version) <= MOST_NAME and bool(_VERSION.fullmatch(version))


def version_key(version: str) -> tuple[list[int], str]:
    """Versions in the order of their numbers."""
    return [int(part) for part in version.split(".")], version


def _there_is(root: str | os.PathLike[str], name: str) -> str:
    known = versions(root, name) if name else []
    if known:
        table = aliases(root, name)
        also = f"; aliases {', '.join(f'{a} ({v})' for a, v in sorted(table.items()))}" if table else ""
        return f"{name} has versions {', '.join(known)}{also}"
    names = models(root)
    return f"models there are {', '.join(names)}" if names else "it holds no models"
