"""The process above a worker: starts it, starts it again when it fails, ends it when it hangs, passes signals on.

Knows processes, signals and exit statuses; knows neither torch nor the broker, so that it is small and outlives what they
do. The worker ends with it: on Linux at once and whatever it is doing, elsewhere as soon as it notices.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final

from penstock.broker.notify import Notifier
from penstock.worker.backoff import Backoff
from penstock.worker.config import DEVICE_FAULT_STATUS, GAVE_UP_STATUS, REFUSED_STATUS, SESSIONS_VARIABLE, WorkerConfig
from penstock.worker.watch import ENDING, IN_KERNEL, Activity, Page
from penstock.worker.watchdog import Watchdog, what

log = logging.getLogger("penstock.worker")
LOOK_S: Final = 0.25
END_S: Final = 5.0
"""A worker that was told twice, or whose starter is gone, has so long to end by itself."""
MAX_FAULT: Final = 500


class Supervisor:
    """One worker's, from its first start to its end.

    Args:
        config: the worker's settings; arguments: its command line, which made them.
    """

    def __init__(self, config: WorkerConfig, arguments: Sequence[str]) -> None:
        self._name = config.session_name
        self._config = config
        self._page = Page()
        own = ["--unsupervised", "--name", self._name, "--parent", str(os.getpid()), "--page", str(self._page.fd)]
        self._command = [sys.executable, "-P", "-m", "penstock.worker", *arguments, *own]
        self._backoff = Backoff(config.max_failures)
        self._notifier = Notifier()
        self._look_s = min(LOOK_S, config.hang_limit_s / 4)
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog = Watchdog(self._is_stopped)
        self._secret = b""
        self._started_at = 0.0
        self._restart_at = 0.0
        self._was_ready = False
        self._is_announced = False
        self._hang: str | None = None
        self._fault = ""
        self._signals: list[int] = []
        self._num_passed_on = 0
        self._kill_at: float | None = None
        self._wake, self._wake_writer = os.pipe()

    def run(self) -> int:
        """Supervise; the exit status comes back, and the worker is gone."""
        with self._signals_caught():
            try:
                self._start()
                while (status := self._turn()) is None:
                    self._notify()
                    self._wait()
                return status
            finally:
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()

    @contextlib.contextmanager
    def _signals_caught(self) -> Iterator[None]:
        for fd in (self._wake, self._wake_writer):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # it only ends the wait
        is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGINT, *(() if is_nohup else (signal.SIGHUP,))):
            signal.signal(number, lambda number, frame: self._signals.append(number))
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)

    def _wait(self) -> None:
        wait_s = self._look_s if self._process is not None else max(self._restart_at - time.monotonic(), 0.0)
        select.select([self._wake], [], [], min(wait_s, LOOK_S))
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    # --- one turn ------------------------------------------------------------------------------------------------

    def _turn(self) -> int | None:
        """Act upon what has happened; the exit status if that is the end."""
        now = time.monotonic()
        self._pass_on(now)
        if self._process is None:
            if self._is_stopping:
                return 0
            if now >= self._restart_at:
                self._start()
            return None
        status = self._process.poll()
        if status is not None:
            self._process = None
            return self._ended(status, now)
        activity = self._page.read()
        self._was_ready |= activity.is_ready
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = now + END_S
            self._kill("it does not end")
        elif self._hang is None and (hang := self._watchdog.look(activity, self._look_s)) is not None:
            self._hang = hang
            self._kill(hang)
        return None

    def _notify(self) -> None:
        """Tell the service manager that the worker is ready, and that it goes on: a hung one's supervisor says nothing."""
        activity, now = self._page.read(), time.monotonic()
        if activity.is_ready and not self._is_announced and not self._is_stopping:
            self._is_announced = True
            self._notifier.ready(self._status(activity, now))
        elif self._notifier.is_due(now) and (self._process is None or self._watchdog.is_going_on(activity)):
            self._notifier.alive(now, self._status(activity, now))

    def _status(self, activity: Activity, now: float) -> str:
        if self._process is None:
            return f"starts again in {max(self._restart_at - now, 0.0):.0f} s: {self._fault}"
        return f"{what(activity)}, {activity.num_done} runs done"

    @property
    def _is_stopping(self) -> bool:
        return self._num_passed_on > 0

    def _pass_on(self, now: float) -> None:
        """Signals go to the worker, which drains at the first and ends at the second; so does the end of our starter."""
        parent = self._config.parent
        if parent is not None and os.getppid() != parent and not self._signals:
            log.warning("worker %s: the parent process is gone", self._name)
            self._signals.append(signal.SIGTERM)
            self._kill_at = now + END_S
        while self._num_passed_on < len(self._signals):
            number = self._signals[self._num_passed_on]
            self._num_passed_on += 1
            limit_s = self._config.drain_limit_s if self._num_passed_on == 1 else END_S
            self._kill_at = min(self._kill_at or now + limit_s, now + limit_s)
            self._notifier.stopping("finishes what is held", limit_s + END_S)
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _start(self) -> None:
        config = self._config
        self._hang = None
        self._started_at = time.monotonic()
        self._page.begin(config.first_run_limit_s)
        ended, self._secret = self._secret, os.urandom(16)
        self._process = subprocess.Popen(
            [*self._command, *(["--after-fault", self._fault] if self._fault else [])],
            env=os.environ | {SESSIONS_VARIABLE: f"{self._secret.hex()},{ended.hex()}"},
            stdin=subprocess.DEVNULL, pass_fds=(self._page.fd,), process_group=0,
        )  # fmt: skip

    def _kill(self, why: str) -> None:
        """End the worker and what it has started; a process that the driver holds goes when the driver lets it."""
        assert self._process is not None
        log.error("worker %s: %s: killed", self._name, why)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _is_stopped(self) -> bool:
        """By a signal or a debugger; where the system does not say, no."""
        assert self._process is not None
        try:
            with open(f"/proc/{self._process.pid}/stat", "rb") as f:
                return f.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        except OSError:
            return False

    # --- the worker's end ----------------------------------------------------------------------------------------

    def _ended(self, status: int, now: float) -> int | None:
        """What to do now that the worker has ended: our exit status, or None if it starts again."""
        activity = self._page.read()
        self._was_ready |= activity.is_ready
        if self._is_stopping:
            return status if status >= 0 else 128 - status
        if self._is_final(status, activity):
            return status
        self._fault = self._describe(status, activity)[:MAX_FAULT]
        was_in_kernel = activity.is_ready and (activity.state in IN_KERNEL or status == DEVICE_FAULT_STATUS)
        pause = self._backoff.failed(now - self._started_at, was_in_kernel, activity.num_done > 0)
        if pause is None:
            log.error(
                "worker %s gives up: %d failures in a row, the last: %s", self._name, self._backoff.num_failures, self._fault
            )
            return GAVE_UP_STATUS
        log.warning("worker %s has ended (%s); it starts again in %.1f s", self._name, self._fault, pause)
        self._restart_at = now + pause
        return None

    def _is_final(self, status: int, activity: Activity) -> bool:
        """It was drained, or cannot start: another try would end the same. A kernel may end a process with any status."""
        if status in (0, REFUSED_STATUS) and activity.state == ENDING:
            return True
        return not activity.is_ready and (status in (2, REFUSED_STATUS) or (status == 1 and not self._was_ready))

    def _describe(self, status: int, activity: Activity) -> str:
        if self._hang is not None:
            return self._hang
        if status == DEVICE_FAULT_STATUS:
            return f"exit status {status}: the device is broken"
        if status >= 0:
            return f"exit status {status}"
        return f"killed by {_signal_name(-status)} in {what(activity)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
