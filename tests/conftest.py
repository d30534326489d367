"""What every test shares: a clean import path, short socket paths, reproducible property tests.

Knows nothing of the packages under test. The root and tests/ leave `sys.path` before anything of ours is imported,
because a top-level folder `kernels` found there is taken for the Hugging Face package of that name.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
_HIDDEN = {TESTS, TESTS.parent}


def pytest_collectreport() -> None:
    """A test module of a package puts the folder above that package onto the path: here it does not stay there."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in _HIDDEN]


pytest_collectreport()

os.environ["PYTHONSAFEPATH"] = "1"  # the same for child processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from local folders: no test reaches the network

# `ci` draws the same examples in every run; `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What brokers and workers of tests keep is not the user's; tests may give others."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The root of the working tree."""
    return TESTS.parent


@contextmanager
def _short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tmp_ipc() -> Iterator[Path]:
    """A new folder with a short path: ipc socket paths must stay under about 100 bytes, which `tmp_path` exceeds."""
    with _short_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def module_folder() -> Iterator[Path]:
    """The same for a whole module."""
    with _short_folder() as folder:
        yield folder
