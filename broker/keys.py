"""Who may talk to a broker over tcp: key files, and the folder with the broker's own key and its list of allowed ones.

A key is a CURVE key pair with a name and a role. The secret half lies in a file of its owner, the public half in the broker's
`allowed` folder, one file per key. Knows files and what may stand in them; does not know sockets (`curve.py`, `gate.py`).
"""

import contextlib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import zmq

from penstock.broker.address import Address, read_connection
from penstock.broker.files import default_state_dir

CLIENT, WORKER, ADMIN = "client", "worker", "admin"
ROLES: Final = (CLIENT, WORKER, ADMIN)
ALLOWED: Final = "allowed"
BROKER_KEY: Final = "broker.key"
MAX_KEY_FILE_BYTES: Final = 4096
MAX_KEYS: Final = 10_000
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # z85: neither quotes nor backslashes


class KeyProblem(ValueError):
    """A key, or its file, that cannot be used; the text says which and what would do. Never holds a secret."""


@dataclass(frozen=True, slots=True)
class AllowedKey:
    """The public half, as the broker keeps it. `public` is 40 characters of z85."""

    name: str
    role: str
    public: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise KeyProblem(f"a key's name is 1 to 32 letters, digits, dots, dashes and underscores, not {self.name!r:.60}")
        if self.role not in ROLES:
            raise KeyProblem(f"a role is {', '.join(ROLES)}, not {self.role!r:.60}")
        _check_key(self.public, "public")

    @property
    def principal(self) -> str:
        """Who its holder is to the broker: `role:name`."""
        return f"{self.role}:{self.name}"

    @property
    def fingerprint(self) -> str:
        """Short enough to compare by eye."""
        return blake2b(self.public.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key pair, as its owner keeps it. `server`: the broker's public key, empty if not known."""

    name: str
    role: str
    public: str
    secret: str = field(repr=False)
    server: str = ""

    def __post_init__(self) -> None:
        _check_key(self.public, "public")
        _check_key(self.secret, "secret")
        if self.server:
            _check_key(self.server, "server's")
        if zmq.curve_public(self.secret.encode()) != self.public.encode():
            raise KeyProblem("the public key does not belong to the secret one")


def draw(name: str, role: str, server: str = "") -> OwnKey:
    """A new key pair."""
    public, secret = zmq.curve_keypair()
    return OwnKey(name, role, public.decode(), secret.decode(), server)


def _check_key(text: object, which: str) -> None:
    if not isinstance(text, str) or not _KEY.fullmatch(text):
        raise KeyProblem(f"the {which} key is not 40 characters of z85")


# --- files ---------------------------------------------------------------------------------------------------------


def write_key(path: Path, key: OwnKey) -> None:
    """Keep a secret key in a new file, mode 0600.

    Raises:
        KeyProblem: there is such a file, or it cannot be written.
    """
    lines = ["# Secret: whoever can read this file is its owner. Keep it at mode 0600."]
    _write_new(path, lines, {n: getattr(key, n) for n in ("name", "role", "public", "secret", "server")})


def read_key(path: Path) -> OwnKey:
    """A secret key from its file.

    Raises:
        KeyProblem: it cannot be read, others can read it, or it holds no key.
    """
    content = _read(path, secret=True)
    try:
        return OwnKey(**content)
    except (KeyProblem, TypeError) as e:
        raise KeyProblem(f"{path}: {e if isinstance(e, KeyProblem) else 'it holds no key'}") from None


def find_key(explicit: Path | None, address: Address, env: Mapping[str, str] = os.environ) -> OwnKey | None:
    """The key to show at an address: the argument's file, else that of PENSTOCK_KEY; None if there is none or need be none.

    The broker's public key stands in the key file, else in the connection file if that is about the same address.

    Raises:
        KeyProblem: the key cannot be used.
    """
    path = explicit or (Path(env["PENSTOCK_KEY"]) if env.get("PENSTOCK_KEY") else None)
    if address.is_ipc or path is None:
        return None
    key = read_key(path.expanduser())
    if key.server:
        return key
    published = read_connection(env)
    if published.get("url") != address.url or not published.get("server_key"):
        raise KeyProblem(f"{path} does not name the broker's public key: add the line `server` of `penstock keys list`")
    return OwnKey(key.name, key.role, key.public, key.secret, str(published["server_key"]))


def _write_new(path: Path, comments: list[str], values: Mapping[str, str]) -> None:
    """All of a new file at once, mode 0600 from its first moment; never over another one."""
    text = "\n".join([*comments, *(f'{name} = "{value}"' for name, value in values.items() if value), ""])
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.unlink(missing_ok=True)
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.link(part, path)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError as e:
        raise KeyProblem(f"{path} is there already") from e
    except OSError as e:
        raise KeyProblem(f"{path} cannot be written: {e.strerror}") from e


def _read(path: Path, secret: bool) -> dict[str, Any]:
    """The TOML of a key file. What others may read is no secret, and what they may write allows nobody."""
    try:
        with path.open("rb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
            data = f.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as e:
        raise KeyProblem(f"{path} cannot be read: {e.strerror}") from e
    if mode & (0o077 if secret else 0o022):
        raise KeyProblem(f"{path} has mode {mode:04o}, others can {'read' if secret else 'change'} it: chmod 600 {path}")
    try:
        if len(data) > MAX_KEY_FILE_BYTES:
            raise ValueError
        return tomllib.loads(data.decode())
    except ValueError:  # its text could hold a secret, so that it is not repeated
        raise KeyProblem(f"{path} is no key file") from None


# --- the broker's folder -------------------------------------------------------------------------------------------


class KeyFolder:
    """`broker.key` and `allowed/NAME.toml`, below the state directory."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self.path = (state_dir or default_state_dir()) / "keys"

    @property
    def has_any(self) -> bool:
        """Whether any key is allowed, usable or not."""
        return any((self.path / ALLOWED).glob("*.toml"))

    def broker_key(self) -> OwnKey:
        """The broker's own, made when it is first asked for. Raises KeyProblem."""
        path = self.path / BROKER_KEY
        with contextlib.suppress(KeyProblem):  # another process was first, or it cannot be: reading tells
            if not path.exists():
                write_key(path, draw("broker", "broker"))
        return read_key(path)

    def allowed(self) -> list[AllowedKey]:
        """All keys that may connect, by name.

        Raises:
            KeyProblem: one of the files cannot be used; the text names it.
        """
        folder = self.path / ALLOWED
        paths = sorted(folder.glob("*.toml"))
        if paths and folder.stat().st_mode & 0o022:
            raise KeyProblem(f"others can put keys into {folder}: chmod 700 {folder}")
        if len(paths) > MAX_KEYS:
            raise KeyProblem(f"{folder} has {len(paths)} keys, at most {MAX_KEYS} are allowed")
        return [self._read_allowed(path) for path in paths]

    def _read_allowed(self, path: Path) -> AllowedKey:
        content = _read(path, secret=False)
        try:
            return AllowedKey(name=path.stem, **content)
        except (KeyProblem, TypeError) as e:
            raise KeyProblem(f"{path}: {e if isinstance(e, KeyProblem) else 'it needs role and public, no more'}") from None

    def new(self, name: str, role: str, path: Path) -> AllowedKey:
        """Draw a key, keep its secret half in a new file at `path` and allow it.

        Raises:
            KeyProblem: a wrong name or role, or either file is there already.
        """
        key = draw(name, role, self.broker_key().public)
        allowed = AllowedKey(name, role, key.public)
        listed = self.path / ALLOWED / f"{name}.toml"
        if listed.exists():
            raise KeyProblem(f"there is a key called {name}: revoke it first, or choose another name")
        write_key(path, key)
        _write_new(listed, [], {"role": role, "public": key.public})
        return allowed

    def revoke(self, name: str) -> None:
        """Allow it no more; a running broker hears of it when it reloads. Raises KeyProblem: there is none."""
        if not _NAME.fullmatch(name):
            raise KeyProblem(f"no key is called {name!r:.60}")
        try:
            (self.path / ALLOWED / f"{name}.toml").unlink()
        except FileNotFoundError:
            raise KeyProblem(f"no key is called {name}") from None
        except OSError as e:
            raise KeyProblem(f"{name} cannot be revoked: {e.strerror}") from e
