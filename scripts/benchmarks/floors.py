"""The floor: what bare pyzmq carries through a Python ROUTER loop in three processes over ipc, with no product around it.

Knows sockets only. `python floors.py broker|worker FOLDER` are the two other processes; `Floor` drives them as the client.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import zmq

TASK_BYTES = 4096
FRAMES_PER_MESSAGE = 32
IN_FLIGHT = 1024


def run_broker(folder: str) -> None:
    """Forward whole messages between one worker and any number of clients."""
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    for s, name in ((front, "front"), (back, "back")):
        s.set_hwm(0)
        s.bind(f"ipc://{folder}/{name}")
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    poller.register(back, zmq.POLLIN)
    worker = b""
    while True:
        for s, _ in poller.poll():
            for _ in range(200):
                try:
                    message = s.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if s is front:
                    back.send_multipart([worker, *message])
                elif message[1] == b"ready":
                    worker = message[0]
                else:
                    front.send_multipart(message[1:])


def run_worker(folder: str) -> None:
    """Send everything back."""
    s = zmq.Context().socket(zmq.DEALER)
    s.set_hwm(0)
    s.connect(f"ipc://{folder}/back")
    s.send(b"ready")
    while True:
        s.send_multipart(s.recv_multipart())


class Floor:
    """The bare three processes, running; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._socket = zmq.Context.instance().socket(zmq.DEALER)

    def __enter__(self) -> "Floor":
        self._folder.mkdir(parents=True, exist_ok=True)
        for role in ("broker", "worker"):
            self._processes.append(subprocess.Popen([sys.executable, "-P", __file__, role, str(self._folder)]))
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{self._folder}/front")
        time.sleep(1.0)  # bare sockets have no handshake to wait for: the worker's greeting has to arrive first
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close(0)
        for p in self._processes:
            p.kill()
            p.wait()

    def tasks_per_s(self, seconds: float) -> float:
        """Throughput of echoed 4 KiB frames, 32 in a message, 1,024 in flight."""
        message = [b"id", *[os.urandom(TASK_BYTES)] * FRAMES_PER_MESSAGE]
        num_messages = IN_FLIGHT // FRAMES_PER_MESSAGE
        for _ in range(num_messages):
            self._socket.send_multipart(message)
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(10):
                self._socket.recv_multipart()
                self._socket.send_multipart(message)
                done += FRAMES_PER_MESSAGE
        took = time.perf_counter() - started
        for _ in range(num_messages):
            self._socket.recv_multipart()
        return done / took

    def round_trips_s(self, count: int) -> list[float]:
        """Times of single 4 KiB round trips, one in flight."""
        payload, times = os.urandom(TASK_BYTES), list[float]()
        for _ in range(count):
            started = time.perf_counter()
            self._socket.send_multipart([b"id", payload])
            self._socket.recv_multipart()
            times.append(time.perf_counter() - started)
        return times


if __name__ == "__main__":
    {"broker": run_broker, "worker": run_worker}[sys.argv[1]](sys.argv[2])
