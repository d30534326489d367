"""What is around a worker's process: who starts it again, and whatever befalls it from outside."""

from typing import TYPE_CHECKING

from simulation.worker import Worker

if TYPE_CHECKING:
    from simulation.world import World


class Supervisor:
    """Starts a worker's process again when it has ended.

    Args:
        tells: the kernel tells the broker of the process's end; the next process does in any case, with its hello.
    """

    def __init__(self, world: "World", name: str, num_slots: int, tells: bool) -> None:
        random = world.timeline.random
        self.world, self.name = world, name
        self.num_slots, self.tells = num_slots, tells
        self.max_batch_size = 8
        self.load_s = random.uniform(0.0, 0.3)
        self.is_stopping = False
        self.worker: Worker | None = None
        self._start("", b"")

    def _start(self, fault: str, ended: bytes) -> None:
        self.is_stopping = False
        self.worker = Worker(self, self.world.next_pid(), fault, ended)
        self.world.timeline.note(self.name, f"process {self.worker.pid} starts")

    def ended(self, worker: Worker, status: int, why: str, last: float) -> None:
        self.worker = None
        if self.tells:  # what a process sent before its end has come first
            self.world.timeline.at(last + 0.005, self.world.broker.process_ended, worker.pid)
        pause_s = self.world.timeline.random.uniform(0.01, 0.4)
        self.world.timeline.after(pause_s, self._start, why if status else "", worker.secret)

    def kill(self) -> None:
        if self.worker is not None:
            self.worker.end("kill -9", 137)

    def quit(self) -> None:
        """A second signal: it ends at once, out of a kernel, and says goodbye."""
        if self.worker is not None:
            self.worker.close("interrupted", is_fault=False, status=130)

    def drain(self) -> None:
        if self.worker is not None and self.worker.session.work is not None:
            self.is_stopping = True
            self.worker.wake()

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        worker = self.worker
        if worker is not None and not worker.is_paused:
            worker.is_paused = True
            self.world.timeline.note(self.name, f"stands still for {seconds:.2f} s")
            self.world.timeline.after(seconds, self._resume, worker)

    def _resume(self, worker: Worker) -> None:
        worker.is_paused = False
        if not worker.is_over:
            self.world.timeline.note(self.name, "goes on")
            worker.wake()
