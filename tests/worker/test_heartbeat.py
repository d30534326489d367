"""The heartbeats' thread, without running it: when the broker counts as silent."""

import time
from pathlib import Path

import zmq

from penstock.worker.heartbeat import MAX_SILENT, Heart
from penstock.worker.transport import Wake, dealer


def test_silence_begins_with_a_beat_that_has_no_answer(tmp_ipc: Path) -> None:
    """This process may have stood still, while torch was loaded say: that is no silence of the broker."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = f"ipc://{tmp_ipc}/workers.sock"
    heart, socket = Heart(context, endpoint, bytes(16), Wake(), lambda: (0, {})), dealer(context, endpoint)
    try:
        heart.begin(100.0)
        much_later = time.monotonic() + 10 * MAX_SILENT
        heart._look(much_later)
        assert not heart.is_lost
        heart._send(socket)
        heart._look(time.monotonic())
        assert not heart.is_lost
        heart._look(much_later)
        assert heart.is_lost
    finally:
        socket.close(0)
        context.term()
