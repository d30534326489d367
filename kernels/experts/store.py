"""Experts of mixture-of-experts layers that do not all fit the device: files behind a fixed number of slots.

Knows when experts are loaded, used and left; what is in which slot is `slots.py`, copying `copier.py`, files `files.py`.
"""

# mypy: disable-error-code="no-untyped-call"

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from penstock.kernels.experts.copier import Copier, Event
from penstock.kernels.experts.errors import ExpertMissing, SlotsTooFew, StoreClosed
from penstock.kernels.experts.estimate import Estimate
from penstock.kernels.experts.files import STACKED, ExpertFiles, ExpertNames
from penstock.kernels.experts.slots import Entry, Slots
from penstock.kernels.experts.statistics import StoreStatistics
from penstock.kernels.moe.sorted_gemm import feed_forward

CPU_COMPUTE = ("auto", "never", "always")


class Lease:
    """Experts that stay in their slots until it is closed. `slots`: expert -> slot; read them after `wait`."""

    def __init__(self, store: "ExpertStore", entries: Sequence[Entry]) -> None:
        self.slots = {entry.key[1]: entry.slot for entry in entries}
        self._store = store
        self._entries = entries

    def wait(self) -> None:
        """Returns when the weights may be read by what the current stream is given next.

        Raises what went wrong with loading them: ExpertFileError, StoreClosed.
        """
        for entry in self._entries:
            try:
                event = entry.load.result()
            except CancelledError:
                raise StoreClosed("the expert store was closed before an expert was loaded") from None
            if event is not None:
                torch.cuda.current_stream(self._store.device).wait_event(event)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._store.release(self._entries)


class ExpertStore:
    """`num_slots` experts on a device, the others in memory-mapped safetensors files. Thread-safe.

    Args:
        paths: the files; names: how the tensors are called in them.
        policy: "lru" or "lfu", see `Slots`.
        cpu_compute: whether `moe_offloaded` may have experts without a slot computed on the CPU: "auto" where the times
            measured so far say that it is sooner than fetching them (on a CPU it always is), "never", "always".

    Two calls that need an expert load it once. An expert in use never leaves its slot; a call that needs more slots than
    may be given away waits for other calls. A thread that holds a lease must not take another: it might wait for itself.

    Attributes:
        w_gate_up: `[num_slots, 2 * inter, hidden]`, w_down: `[num_slots, hidden, inter]`: the slots, on `device`.
    """

    def __init__(
        self,
        paths: Iterable[Path | str],
        num_slots: int,
        *,
        device: torch.device | str = "cpu",
        policy: str = "lru",
        cpu_compute: str = "auto",
        names: ExpertNames = STACKED,
    ) -> None:
        """Opens the files and takes the slots' memory. Raises ExpertFileError, ValueError."""
        if cpu_compute not in CPU_COMPUTE:
            raise ValueError(f"cpu_compute must be one of {', '.join(CPU_COMPUTE)}; got {cpu_compute!r}")
        self._slots = Slots(num_slots, policy)
        self.files = files = ExpertFiles(paths, names)
        self.num_slots, self.device = num_slots, torch.device(device)
        is_near = self.device.type == "cpu"  # a slot is no nearer to the processor than the file
        self.cpu_compute = "always" if cpu_compute == "auto" and is_near else cpu_compute
        self.w_gate_up = torch.empty(num_slots, 2 * files.inter, files.hidden_size, dtype=files.dtype, device=device)
        self.w_down = torch.empty(num_slots, files.hidden_size, files.inter, dtype=files.dtype, device=device)
        self.estimate = Estimate()
        self._copier = Copier(self.device, files.num_bytes, self._observe_fetch)
        self._changed = threading.Condition()
        self._readers: list[list[Event]] = [[] for _ in range(num_slots)]  # by slot, to be waited for before it is filled
        self._counts: Counter[str] = Counter()
        self._random_hits = 0.0
        self._is_closed = False

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Keeps distinct experts of a layer in slots and begins to load those that are not; waits for slots, not for loads.

        Raises ExpertMissing, SlotsTooFew, StoreClosed.
        """
        keys = [(layer, expert) for expert in experts]
        if len(keys) > self.num_slots:
            raise SlotsTooFew(f"{len(keys)} experts are needed at once; the store has {self.num_slots} slots")
        if len(set(keys)) < len(keys):
            raise ValueError(f"experts must be distinct; got {list(experts)}")
        for expert in experts:
            self._check(layer, expert)
        with self._changed:
            has_waited = False
            while True:
                self._check_open()
                num_resident = self._slots.num_resident(layer)
                if (taken := self._slots.take(keys)) is not None:
                    break
                self._counts["waits"] += not has_waited
                has_waited = True
                self._changed.wait()
            entries, missing = taken
            self._count(layer, len(entries) - len(missing), len(missing), num_resident)
            for entry in missing:
                self._load(entry)
            return Lease(self, entries)

    def prefetch(self, layer: int, experts: Iterable[int]) -> int:
        """Begins to load experts that will be needed, as far as slots may be given away; how many. Raises ExpertMissing."""
        return self._load_ahead(layer, experts, self._slots.prefetch)

    def choose_cpu(self, layer: int, rows: Mapping[int, int]) -> list[int]:
        """Which of the experts in `rows` (expert -> its rows) are to be computed on the CPU now; `estimate` says why."""
        with self._changed:
            absent = {expert: count for expert, count in rows.items() if (layer, expert) not in self._slots.entries}
            if self.cpu_compute == "auto":
                return self.estimate.choose_cpu(absent)
            return list(absent) if self.cpu_compute == "always" else []

    def resident_first(self, layer: int, experts: Iterable[int]) -> list[int]:
        """The experts, those that have a slot before the others."""
        with self._changed:
            return sorted(experts, key=lambda expert: ((layer, expert) not in self._slots.entries, expert))

    def compute_on_cpu(self, layer: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """An expert's answers for rows `[n, hidden]` on the CPU, straight from the file. Counted as a miss.

        The expert is fetched as well, in the background, if it is used more often than what it would replace.
        """
        views = self.files.views(layer, expert)
        start = time.perf_counter()
        out = feed_forward(rows, views.gate_up, views.down)
        seconds = time.perf_counter() - start
        with self._changed:
            self._check_open()
            self.estimate.observe_cpu(len(rows), seconds)
            self._count(layer, 0, 1, self._slots.num_resident(layer))
            self._counts["on_cpu"] += 1
            self._slots.count_use((layer, expert))
        if self.cpu_compute == "auto":
            self._load_ahead(layer, [expert], self._slots.admit)
        return out

    def release(self, entries: Sequence[Entry]) -> None:
        """Ends a lease: what the current stream has been given so far is still waited for before a slot is filled again."""
        event = None
        if self.device.type == "cuda":
            event = Event()
            event.record(torch.cuda.current_stream(self.device))
        with self._changed:
            for entry in entries:
                if event is not None:
                    readers = self._readers[entry.slot]
                    readers[:] = [reader for reader in readers if not reader.query()] + [event]
            self._slots.release(entries)
            self._changed.notify_all()

    def statistics(self) -> StoreStatistics:
        """The counts up to now."""
        with self._changed:
            counts = {name: self._counts[name] for name in ("hits", "misses", "on_cpu", "fetches", "prefetches", "waits")}
            return StoreStatistics(
                **counts,
                failures=self._counts["failures"],
                random_hits=self._random_hits,
                evictions=self._slots.num_evictions,
                num_bytes=self._counts["fetches"] * self.files.num_bytes,
            )

    def close(self) -> None:
        """Ends its thread; whoever waits gets StoreClosed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._copier.close()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check(self, layer: int, expert: int) -> None:
        count = self.files.num_experts.get(layer, 0)
        if not 0 <= expert < count:
            raise ExpertMissing(f"there is no expert {expert} of layer {layer}, which has {count}")

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed("the expert store is closed")

    def _count(self, layer: int, hits: int, misses: int, num_resident: int) -> None:
        self._counts["hits"] += hits
        self._counts["misses"] += misses
        self._random_hits += (hits + misses) * num_resident / self.files.num_experts[layer]

    def _load_ahead(self, layer: int, experts: Iterable[int], place: Callable[[tuple[int, int]], Entry | None]) -> int:
        num_started = 0
        for expert in experts:
            self._check(layer, expert)
            with self._changed:
                self._check_open()
                if (entry := place((layer, expert))) is not None:
                    self._load(entry)
                    num_started += 1
        with self._changed:
            self._counts["prefetches"] += num_started
        return num_started

    def _load(self, entry: Entry) -> None:
        """Begins to fill a slot that has just been given to an entry. Holds the lock."""
        after, self._readers[entry.slot] = self._readers[entry.slot], []
        entry.load = self._copier.submit(partial(self._pairs, entry), after, partial(self._loaded, entry))

    def _pairs(self, entry: Entry) -> list[tuple[torch.Tensor, torch.Tensor]]:
        views = self.files.views(*entry.key)
        gate_up = self.w_gate_up[entry.slot].chunk(len(views.gate_up))
        return [*zip(views.gate_up, gate_up, strict=True), (views.down, self.w_down[entry.slot])]

    def _loaded(self, entry: Entry, is_there: bool) -> None:
        with self._changed:
            self._counts["fetches" if is_there else "failures"] += 1
            (self._slots.loaded if is_there else self._slots.failed)(entry)
            self._changed.notify_all()

    def _observe_fetch(self, seconds: float) -> None:
        with self._changed:
            self.estimate.observe_fetch(seconds)
