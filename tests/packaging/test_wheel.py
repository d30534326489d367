"""The wheel holds exactly the tracked files of the four folders, and works where the sources are not."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(command: Sequence[str | Path], cwd: Path, timeout_s: float = 60) -> str:
    """Runs a command in a folder, without our import path, and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The paths of a clean clone: what git tracks or would add."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    # The first option: a checkout that belongs to another user, as in many containers.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = run(command, ROOT).split("\0")
    return sorted({path for path in listed if path and (ROOT / path).is_file()})


@pytest.fixture(scope="module")
def wheel(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by way of an sdist of a clean clone. `setuptools` must be installed; nothing is downloaded."""
    base = tmp_path_factory.mktemp("build")
    clone, sdists, wheels = base / "clone", base / "sdist", base / "wheel"
    for path in tracked:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, clone / path, follow_symlinks=False)
    sdist = run([sys.executable, "-c", BUILD, "build_sdist", sdists], clone).split()[-1]
    shutil.unpack_archive(sdists / sdist, base, filter="data")
    unpacked = base / sdist.removesuffix(".tar.gz")
    return wheels / run([sys.executable, "-c", BUILD, "build_wheel", wheels], unpacked).split()[-1]


def test_the_wheel_holds_exactly_the_tracked_files(wheel: Path, tracked: list[str]) -> None:
    expected = {f"penstock/{path}" for path in tracked if path.split("/")[0] in PACKAGES and "/" in path}
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert inside == expected
    assert {f"penstock/{name}/py.typed" for name in PACKAGES} <= inside
    assert len(licences) == 1


def test_the_wheel_runs_where_the_sources_are_not(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import penstock.client, penstock.broker.protocol, penstock.kernels, penstock.worker\n"
        "print(penstock.client.__file__, penstock.broker.protocol.__file__, sep='\\n')"
    )
    for path in run([sys.executable, "-P", "-c", program], tmp_path).split():
        assert Path(path).is_relative_to(site)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_base_install_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    bin_dir = environment / "bin"
    pip_install: list[str | Path] = [bin_dir / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run([*pip_install, wheel], tmp_path, timeout_s=240)
    program = "import penstock.broker.core, penstock.client.cli, importlib.util as u; print(u.find_spec('torch'))"
    assert run([bin_dir / "python", "-c", program], tmp_path).strip() == "None"
    assert "usage" in run([bin_dir / "penstock", "--help"], tmp_path).lower()
