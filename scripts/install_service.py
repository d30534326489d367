"""The systemd services of a broker and one worker per device: installed, or taken away again. Standard library only.

Knows which files go where, and which commands make them count. A dry run unless told --apply: it prints the same plan.
"""

import argparse
import glob
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).resolve().parent / "systemd"
UNITS: Final = ("penstock.target", "penstock-broker.service", "penstock-worker@.service")
FILES: Final = {
    **{name: f"/etc/systemd/system/{name}" for name in UNITS},
    "sysusers.d/penstock.conf": "/etc/sysusers.d/penstock.conf",
    "tmpfiles.d/penstock.conf": "/etc/tmpfiles.d/penstock.conf",
}
SETTINGS: Final = "/etc/penstock/penstock.toml"
"""The operator's: written once, never changed or removed."""
DEVICE: Final = re.compile(r"cpu|cuda:\d{1,3}")
HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What ProtectHome and PrivateTmp keep from the services."""
EPILOG: Final = """\
Without --apply nothing is changed. From a checkout the services run its .venv; of an installation from the package index
give the virtual environment: install-service --venv /opt/penstock. Installed again after an upgrade, it changes what differs.
docs/services.md has the rest.
"""


class Problem(Exception):
    """It cannot be done; the text is one line that says what to change."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="install-service", description="Penstock as systemd services.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--apply", action="store_true", help="do it (as root)")
    add("--uninstall", action="store_true", help="take the services away; settings, state and the user stay")
    add("--venv", type=Path, metavar="DIR", help="the virtual environment with penstock (default: .venv of this checkout)")
    add("--device", action="append", metavar="NAME", help="cpu, cuda:0, ...: a worker each (default: every GPU, else cpu)")
    add("--root", type=Path, metavar="DIR", help="another root folder, such as an image's: writes files, runs no command")
    return made


# --- what is to be done --------------------------------------------------------------------------------------------


def find_devices() -> list[str]:
    """One name for every NVIDIA GPU, in the order of CUDA's default; the CPU where there is none."""
    num_gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    return [f"cuda:{i}" for i in range(num_gpus)] or ["cpu"]


def contents(venv: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every file that is ours."""
    for source, target in FILES.items():
        yield target, (SOURCES / source).read_text(encoding="utf-8").replace("@BIN@", str(venv / "bin"))


def commands(devices: Sequence[str], is_uninstall: bool) -> tuple[list[str], list[str]]:
    """What to run before and after the files are written or removed."""
    broker, target, worker = "penstock-broker.service", "penstock.target", "penstock-worker@.service"
    if is_uninstall:
        stop = f"systemctl stop penstock-worker@*.service {broker} {target}"
        return [stop, f"systemctl disable {worker} {broker} {target}"], ["systemctl daemon-reload"]
    workers = " ".join(f"penstock-worker@{device}.service" for device in devices)
    return [], [
        "systemd-sysusers penstock.conf", "systemd-tmpfiles --create penstock.conf", "systemctl daemon-reload",
        f"systemctl enable --now {target} {broker} {workers}",
    ]  # fmt: skip


def concerns(venv: Path, root: Path) -> Iterator[str]:
    """Why services could not run this environment. Raises Problem: there is nothing to run."""
    program = _within(root, venv / "bin" / "penstock")
    if not os.access(program, os.X_OK):
        raise Problem(f"{program} is not there: install penstock[worker] into a virtual environment and give it as --venv")
    places = {str(venv)}
    if root == Path("/"):
        places.add(str((venv / "bin" / "python").resolve()))  # one that came from elsewhere
    for place in sorted(places):
        if any(Path(place).is_relative_to(folder) for folder in HIDDEN):
            yield f"the services cannot see {place}: they have no home folders and a /tmp of their own; use /opt or /usr"


def _within(root: Path, path: str | Path) -> Path:
    return root / str(path).lstrip("/")


# --- doing it ------------------------------------------------------------------------------------------------------


class Installer:
    """Carries a plan out, or says what it would be.

    Args:
        root: the folder that is / for the services.
        is_dry: only say it.
    """

    def __init__(self, root: Path, is_dry: bool) -> None:
        self._root = root
        self._is_dry = is_dry

    def write(self, path: str, text: str) -> None:
        target = _within(self._root, path)
        old = target.read_text(encoding="utf-8") if target.is_file() else None
        if old == text:
            print(f"unchanged    {path}")
            return
        self._say("write", f"{path} ({'new' if old is None else 'changed'})")
        if not self._is_dry:
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            new = target.with_name(f"{target.name}.new")
            new.write_text(text, encoding="utf-8")
            new.chmod(0o644)
            new.replace(target)

    def write_once(self, path: str, text: str) -> None:
        if _within(self._root, path).exists():
            print(f"keep         {path}")
        else:
            self.write(path, text)

    def remove(self, path: str) -> None:
        target = _within(self._root, path)
        if target.exists():
            self._say("remove", path)
            if not self._is_dry:
                target.unlink()

    def run(self, command: str) -> None:
        """Raises Problem: it failed."""
        if self._root != Path("/"):
            print(f"left to run  {command}")
            return
        self._say("run", command)
        if not self._is_dry:
            done = subprocess.run(shlex.split(command), check=False)
            if done.returncode:
                raise Problem(f"{command}: exit status {done.returncode}")

    def _say(self, verb: str, what: str) -> None:
        print(f"{f'would {verb}' if self._is_dry else verb:<12} {what}", flush=True)


def install(installer: Installer, venv: Path, devices: Sequence[str]) -> None:
    for path, text in contents(venv):
        installer.write(path, text)
    installer.write_once(SETTINGS, (SOURCES / "penstock.toml").read_text(encoding="utf-8"))
    for command in commands(devices, is_uninstall=False)[1]:
        installer.run(command)
    print("\nWho may use it: members of the group penstock (usermod -aG penstock NAME), with PENSTOCK_URL=ipc:///run/penstock")


def uninstall(installer: Installer) -> None:
    before, after = commands((), is_uninstall=True)
    for command in before:
        installer.run(command)
    for path in FILES.values():
        installer.remove(path)
    for command in after:
        installer.run(command)
    print(f"\nStill there: {SETTINGS}, /var/lib/penstock, /var/cache/penstock, the user penstock")


def check_apply(root: Path) -> None:
    """Raises Problem: not here, or not by this user."""
    if root != Path("/"):
        return
    if os.geteuid() != 0:
        raise Problem("--apply changes the system: run it as root (sudo)")
    if not Path("/run/systemd/system").is_dir():
        raise Problem("this machine was not started by systemd: there is nothing to install services into")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    root = (args.root or Path("/")).resolve()
    venv = Path(os.path.abspath(args.venv or SOURCES.parent.parent / ".venv"))  # not resolved: what is given is what is run
    devices = args.device or find_devices()
    try:
        if wrong := [device for device in devices if not DEVICE.fullmatch(device)]:
            raise Problem(f"a device is cpu or cuda:<index>, not {wrong[0]!r}")
        if args.apply:
            check_apply(root)
        problems = [] if args.uninstall else list(concerns(venv, root))
        if args.apply and problems:
            raise Problem(problems[0])
        installer = Installer(root, is_dry=not args.apply)
        if args.uninstall:
            uninstall(installer)
        else:
            install(installer, venv, devices)
    except (Problem, OSError) as e:
        print(f"install-service: {e}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"\nBUT: {problem}")
    if not args.apply:
        print("\nNothing has been changed: --apply does it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
