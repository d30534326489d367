"""`penstock keys`: who may talk to this machine's broker over tcp. Works on files, and tells a running broker to reload."""

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from penstock.broker.keys import ROLES, KeyFolder
from penstock.client import Client
from penstock.client.cli.arguments import QUICK_CONNECT_S, AsJson, CommandFailed, Url
from penstock.client.cli.up import setting
from penstock.client.errors import PenstockError, Unavailable

EPILOG: Final = """\b
a worker on another machine:
  penstock keys new gpu-2 --role worker                                   here
  penstock broker --listen tcp://0.0.0.0:7777                             here
  scp gpu-2.key gpu-2:                                                    here
  penstock worker --broker tcp://THIS-MACHINE:7777 --key gpu-2.key        there
"""

app = typer.Typer(help="Keys for brokers on tcp: make, list, revoke.", epilog=EPILOG, no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="what the broker calls its holder")]
Role = Annotated[str, typer.Option(help=f"{', '.join(ROLES)}; an admin is a client that may control the broker")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="where the secret key goes (default: NAME.key here)")]
StateDir = Annotated[Path | None, typer.Option(metavar="FOLDER", help="the broker's (default: its settings)")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="a penstock.toml (default: the one here)")]


def _folder(state_dir: Path | None, config: Path | None) -> KeyFolder:
    configured = setting("broker", "state_dir", config)
    return KeyFolder(state_dir or (Path(configured) if configured else None))


@app.command()
def new(
    name: Name, role: Role, out: Out = None, state_dir: StateDir = None, config: Config = None, url: Url = None
) -> int:
    """Make a key, allow it, and leave its secret half in a file for its holder."""
    path = out or Path(f"{name}.key")
    key = _folder(state_dir, config).new(name, role, path)
    print(f"{key.principal} ({key.fingerprint}) is allowed; its secret key is in {path}: give it to its holder only")
    print(_tell(url))
    return 0


@app.command("list")
def list_(as_json: AsJson = False, state_dir: StateDir = None, config: Config = None) -> int:
    """Show the allowed keys, and the broker's own public key."""
    folder = _folder(state_dir, config)
    server, allowed = folder.broker_key().public, folder.allowed()
    if as_json:
        keys = [{"name": k.name, "role": k.role, "fingerprint": k.fingerprint, "public": k.public} for k in allowed]
        print(json.dumps({"server": server, "keys": keys}))
        return 0
    print(f'server = "{server}"')
    for key in allowed:
        print(f"{key.name:<32}  {key.role:<6}  {key.fingerprint}")
    return 0


@app.command()
def revoke(name: Name, state_dir: StateDir = None, config: Config = None, url: Url = None) -> int:
    """Allow a key no more; whoever is connected with it is out at once."""
    _folder(state_dir, config).revoke(name)
    print(f"{name} is revoked")
    print(_tell(url))
    return 0


def _tell(url: str | None) -> str:
    """Have the running broker read its keys again; what came of it.

    Raises:
        CommandFailed: there is one, and it goes on with the keys that it had.
    """
    try:
        with Client(url, name="penstock keys", connect_timeout=QUICK_CONNECT_S) as client:
            client.reload()
            has_keys = "security" in client.status()
    except Unavailable:
        return "no broker runs here that would have to know"
    except (PenstockError, TimeoutError) as e:
        raise CommandFailed(f"that is done, but the running broker does not go by it yet: {e}") from e
    return "the running broker knows" if has_keys else "the running broker asks for no keys: start it again, with a tcp address"
