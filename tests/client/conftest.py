"""A fake broker in a thread, and clients of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from client_fakes import FakeBroker

from penstock.client import Client


@pytest.fixture
def fake(tmp_ipc: Path) -> Iterator[FakeBroker]:
    with FakeBroker(tmp_ipc) as broker:
        yield broker


@pytest.fixture
def ps(fake: FakeBroker) -> Iterator[Client]:
    with Client(fake.url) as client:
        yield client
