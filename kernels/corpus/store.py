"""Named corpora as files: `corpora/<principal>/<name>/<version>.safetensors` under the state directory.

Knows names, versions, owners and how a file becomes durable; does not know devices or searching. Several processes of
one machine may use a directory at once: a writer holds the folder's lock, a reader needs none, because a version's file
appears whole, never changes, and stays readable for whoever has opened it. Concurrent writers get different versions.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from penstock.kernels.errors import InvalidInput, LoadError, shown

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
KEPT_VERSIONS = 2
_FILE = re.compile(r"([1-9][0-9]{0,17})\.safetensors")
_LOCK = ".lock"
_TEMPORARY = ".new.safetensors"
_KEY = "vectors"


def check_name(name: object) -> str:
    """`name` if a corpus may be called so, else InvalidInput."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidInput(f"a corpus is named with lower-case letters, digits, _ and -, 64 at most; got {shown(name)}")
    return name


def parse_reference(text: object) -> tuple[str, int | None]:
    """("name", None) of `name`, the newest version, or ("name", 3) of `name@3`. Raises InvalidInput."""
    name, at, version = str(text).partition("@") if isinstance(text, str) else (text, "", "")
    check_name(name)
    if at and not re.fullmatch(r"[1-9][0-9]{0,17}", version, re.ASCII):
        raise InvalidInput(f"a corpus version is a number from 1, as in 'docs@3'; got {shown(text)}")
    return str(name), int(version) if at else None


class CorpusStore:
    """The corpora of one principal."""

    def __init__(
        self, state_dir: Path, principal: str, max_corpora: int = 1024, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock`: seconds since 1970, recorded as the time of creation."""
        self._owner = principal
        self._max_corpora = max_corpora
        self._clock = clock
        # Any text may be a principal; the readable part is for people, the hash tells them apart.
        readable = re.sub(r"[^A-Za-z0-9]+", "-", principal).strip("-")[:24]
        digest = hashlib.blake2b(principal.encode(), digest_size=12).hexdigest()
        self.folder = state_dir / "corpora" / f"{readable}-{digest}".lower().lstrip("-")

    def names(self) -> list[str]:
        """The names of the corpora that have a version."""
        if not self.folder.is_dir():
            return []
        return sorted(item.name for item in self.folder.iterdir() if NAME.fullmatch(item.name) and self._of(item.name))

    def versions(self, name: str) -> list[int]:
        """The versions that are there, ascending; empty if there is no such corpus."""
        return self._of(check_name(name))

    def _of(self, name: str) -> list[int]:
        try:
            with os.scandir(self.folder / name) as entries:
                return sorted(int(match[1]) for entry in entries if (match := _FILE.fullmatch(entry.name)))
        except FileNotFoundError:
            return []

    def create(self, name: str, vectors: torch.Tensor) -> int:
        """Stores float32 `[n, d]` on the CPU durably and returns its version; drops all but the newest two.

        Returns the newest version without writing if it holds the same. Raises InvalidInput for a bad name or one too
        many.
        """
        folder = self.folder / check_name(name)
        if not folder.exists() and len(self.names()) >= self._max_corpora:
            raise InvalidInput(f"corpus {name!r}: you have {self._max_corpora} corpora already, the most allowed")
        vectors = vectors.contiguous()
        content = f"{list(vectors.shape)} {hashlib.blake2b(vectors.numpy().data, digest_size=16).hexdigest()}"
        _make_folder(folder)
        with _locked(folder / _LOCK):
            versions = self._of(name)
            if versions and self._metadata(name, versions[-1]).get("content") == content:
                return versions[-1]
            version = versions[-1] + 1 if versions else 1
            metadata = {
                "owner": self._owner,
                "name": name,
                "version": str(version),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock())),
                "content": content,
            }
            self._write(folder, version, vectors, metadata)
            for old in [*versions, version][:-KEPT_VERSIONS]:
                self._path(name, old).unlink()
        return version

    def _write(self, folder: Path, version: int, vectors: torch.Tensor, metadata: dict[str, str]) -> None:
        """Under the lock, so that one temporary name is enough; what a crash left there is overwritten."""
        temporary = folder / _TEMPORARY
        save_file({_KEY: vectors}, temporary, metadata)
        _sync(temporary)
        os.replace(temporary, folder / f"{version}.safetensors")
        _sync(folder)

    def _path(self, name: str, version: int) -> Path:
        return self.folder / name / f"{version}.safetensors"

    def _metadata(self, name: str, version: int) -> dict[str, str]:
        try:
            with safe_open(self._path(name, version), framework="pt") as file:
                return dict(file.metadata() or {})
        except SafetensorError as error:
            raise LoadError(f"corpus {name}@{version}: its file is damaged: {error}") from error

    def find(self, name: str, version: int | None = None) -> int:
        """The version to use: the one asked for, or the newest. Raises InvalidInput, saying what there is."""
        versions = self.versions(name)
        if not versions:
            raise InvalidInput(
                f"there is no corpus {name!r} of yours; create it with the kernel 'corpus': name={name!r}, vectors=[n, d]"
            )
        if version is not None and version not in versions:
            kept = ", ".join(f"{name}@{kept}" for kept in versions)
            raise InvalidInput(f"there is no {name}@{version} (any more); there are {kept}")
        return versions[-1] if version is None else version

    def load(self, name: str, version: int) -> torch.Tensor:
        """The unit rows of a version: float32 `[n, d]` on the CPU.

        Raises FileNotFoundError if it has been dropped since it was found, LoadError if its file is damaged or not the
        principal's.
        """
        metadata = self._metadata(name, version)
        if (metadata.get("owner"), metadata.get("name")) != (self._owner, name):
            raise LoadError(f"corpus {name}@{version}: its file belongs to another owner or name")
        try:
            return load_file(self._path(name, version))[_KEY]
        except (SafetensorError, KeyError) as error:
            raise LoadError(f"corpus {name}@{version}: its file is damaged: {error}") from error


def _make_folder(folder: Path) -> None:
    """Creates `folder`, for its owner only, and makes it and its parents durable."""
    missing = [item for item in (folder, *folder.parents) if not item.exists()]
    for item in reversed(missing):
        item.mkdir(mode=0o700, exist_ok=True)
        _sync(item.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of `path` against other processes and other opens; the system drops it when a process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
