"""What tests with real processes share: a folder, and a client of the module's broker."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Running

from penstock.client import Client


@pytest.fixture
def folder(tmp_ipc: Path) -> Path:
    """A new folder with a short path for one test."""
    return tmp_ipc


@pytest.fixture
def ps(stack: Running) -> Iterator[Client]:
    """A client of the broker that the module runs as `stack`."""
    with stack.client() as client:
        yield client
