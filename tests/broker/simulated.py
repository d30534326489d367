"""What the tests of the simulator share: tasks of given lengths, any clients, and what holds of every run."""

import math

import numpy as np
from hypothesis import strategies as st

from penstock.broker.simulator.clients import Client
from penstock.broker.simulator.record import Record
from penstock.broker.simulator.service import Service

CLIENT = st.builds(
    Client, name=st.uuids().map(str), tasks=st.integers(1, 40), closed=st.none() | st.integers(1, 5),
    size=st.sampled_from([0.5, 1.0, 3.0]), rows=st.integers(1, 4),
) | st.builds(Client, name=st.uuids().map(str), tasks=st.integers(1, 40), rate=st.sampled_from([0.5, 5.0]))  # fmt: skip


def lengths(*times: float) -> Service:
    """Tasks of these lengths, in this order."""
    return Service("trace", trace=np.array(times))


def check(done: Record, batch_size: int) -> None:
    """What holds of every run."""
    ran = done.batch >= 0
    of = done.batch[ran]
    assert np.array_equal(np.bincount(of, minlength=len(done.size)), done.size)
    assert np.all((done.size >= 1) & (done.size <= batch_size))
    assert np.all(done.arrived[ran] <= done.formed[of]) and np.all(done.formed <= done.began)
    assert np.allclose(done.ended - done.began, done.max_ms / 1000.0)
    if done.num_slots == 1:
        for server in np.unique(done.group):
            began, ended = done.began[done.group == server], done.ended[done.group == server]
            assert np.all(began[1:] >= ended[:-1]), "a server runs one batch at a time"
    assert math.isclose(done.batch_service_s().sum(), (done.ended - done.began).sum())
