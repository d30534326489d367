"""What the broker counts and times, and how that reads for Prometheus.

Knows the metrics' names, labels and buckets. Does not know who records, when, nor who asks. Recording costs a dictionary
lookup and an addition per number; it happens per batch, or per range of rows that end together, never per row.

Counts and histograms grow here; what is true only now (queues, workers, predictions) comes as `Gauges` when asked.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from itertools import islice
from typing import Any, Final

from penstock.broker import exposition
from penstock.broker.exposition import Labels
from penstock.broker.wire import record

PREFIX: Final = "penstock_"
MAX_LABEL_SETS: Final = 200
"""Label sets of one metric. Names of clients and kernels are theirs to choose, so what would be more is called `other`."""
OTHER: Final = "other"
MAX_MEMORY_KINDS: Final = 16
_MOST: Final = 1e15
"""What a worker says it measured is counted from 0 to here."""

SECONDS: Final = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
)  # fmt: skip
ROWS: Final = tuple(float(1 << n) for n in range(13))
SHARES: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class Counts:
    """A counter per label set, at most `MAX_LABEL_SETS`.

    Args:
        folds: places of the labels that others choose, the first to be given up first: once the sets are nearly used up, a
            new one is counted with that label as `other`. The remaining labels must have few values.
    """

    __slots__ = ("_folds", "label_names", "name", "text", "values")

    def __init__(self, name: str, text: str, label_names: Labels, folds: tuple[int, ...]) -> None:
        self.name = PREFIX + name
        self.text = text
        self.label_names = label_names
        self.values: dict[Labels, float] = {}
        self._folds = folds

    def add(self, labels: Labels, amount: float) -> None:
        try:
            self.values[labels] += amount
        except KeyError:
            self._add_new(labels, amount)

    def _add_new(self, labels: Labels, amount: float) -> None:
        """Each label that is given up leaves room for a fifth of what there was before."""
        room = MAX_LABEL_SETS * 4 // 5
        folded = list(labels)
        for place in self._folds:
            if len(self.values) < room or tuple(folded) in self.values:
                break
            folded[place] = OTHER
            room += (MAX_LABEL_SETS - room) * 4 // 5
        key = tuple(folded)
        self.values[key] = self.values.get(key, 0.0) + amount

    def render(self) -> str:
        return exposition.family(self.name, "counter", self.text, self.label_names, self.values)


class Histogram:
    """A histogram per kernel, at most `MAX_LABEL_SETS`; values from 0 up, others are left out."""

    __slots__ = ("_text", "bounds", "name", "rows")

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name = PREFIX + name
        self.bounds = bounds
        self.rows: dict[str, list[float]] = {}
        """Per kernel: counts per bucket (le), one for what is above, and the values' sum."""
        self._text = text

    def observe(self, kernel: str, value: float, count: int = 1) -> None:
        """`count` values that are equal."""
        row = self.rows.get(kernel) or self._row(kernel)
        if 0.0 <= value <= _MOST:
            row[bisect_left(self.bounds, value)] += count
            row[-1] += value * count

    def _row(self, kernel: str) -> list[float]:
        if len(self.rows) >= MAX_LABEL_SETS - 1:
            kernel = OTHER
        return self.rows.setdefault(kernel, [0] * (len(self.bounds) + 1) + [0.0])

    def render(self) -> str:
        return exposition.histogram(self.name, self._text, "kernel", self.bounds, self.rows)


@record
class Gauges:
    """What is true now. Whoever asks fills in what it knows; times are seconds."""

    uptime_s: float = 0.0
    clients: int = 0
    tasks_open: int = 0
    queue_depth: Mapping[tuple[str, str, int], int] = field(default_factory=dict)
    """(kernel, bin, priority) -> queued tasks."""
    queue_oldest_age_s: float = 0.0
    admission_queued_s: float = 0.0
    """Predicted work that is queued."""
    bin_edges_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """kernel -> boundaries between its bins, ascending."""
    prediction_error: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(kernel, device) -> mean of |measured - predicted| / measured."""
    prediction_coverage: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(kernel, device) -> share of batches within their predicted q95."""
    workers: Sequence[tuple[str, str, str]] = ()
    """(name, device, state)."""
    workers_lost: int = 0
    memory: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """worker -> what its heartbeat says; of that the numbers whose names end in `_bytes`."""
    breakers_open: Iterable[tuple[str, str]] = ()
    """(worker, kernel) that get no work because of failures."""
    events: Mapping[str, int] = field(default_factory=dict)
    """kind -> how many since the start."""
    longest_turn_s: float = 0.0
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Of shared memory, as status says it; empty: nothing is shared."""


class Metrics:
    """Everything that is recorded. Kernel names should be those that workers offer, reasons and stages fixed words."""

    def __init__(self) -> None:
        self._requests = Counts("requests_total", "Tasks that have ended.", ("kernel", "outcome", "client"), (2, 0))
        self._rejections = Counts("rejections_total", "Tasks refused at the door.", ("code", "reason"), (1,))
        self._device_s = Counts("device_seconds_total", "Device time charged to a client.", ("client",), (0,))
        self._cancelled = Counts("cancelled_total", "Tasks cancelled, by where they were.", ("stage",), (0,))
        self._missed = Counts("deadline_missed_total", "Tasks that ran out of time, by where they were.", ("stage",), (0,))
        self._queue_s = Histogram("queue_wait_seconds", "From arrival to the worker, of tasks that got there.", SECONDS)
        self._e2e_s = Histogram("e2e_seconds", "From arrival to the outcome, of tasks with an answer or a failure.", SECONDS)
        self._batch_rows = Histogram("batch_size", "Tasks in a batch.", ROWS)
        self._fill = Histogram("batch_fill_ratio", "Tasks in a batch / its limit.", SHARES)
        self._predicted_s = Histogram("batch_predicted_seconds", "A batch's time as predicted.", SECONDS)
        self._actual_s = Histogram("batch_actual_seconds", "A batch's time as measured.", SECONDS)
        self._waste = Histogram("padding_waste_ratio", "Share of a batch's elements that is padding.", SHARES)
        self._h2d_s = Histogram("h2d_seconds", "A batch's way to the device.", SECONDS)
        self._compute_s = Histogram("compute_seconds", "A batch's time on the device.", SECONDS)
        self._d2h_s = Histogram("d2h_seconds", "A batch's way back.", SECONDS)
        self._load_s = Histogram("model_load_seconds", "Loading a kernel.", SECONDS)

    # --- recording -------------------------------------------------------------------------------------------------

    def batch_completed(
        self, kernel: str, timings: Mapping[str, float], num_rows: int, limit: int, predicted_ms: float, measured_ms: float
    ) -> None:
        """A worker has answered a batch.

        Args:
            timings: as the worker sent them: h2d_ms, compute_ms, d2h_ms, padding_ratio (padded / real elements - 1).
            limit: how many rows the batch could have had.
        """
        get = timings.get
        padding = get("padding_ratio", 0.0)
        self._batch_rows.observe(kernel, num_rows)
        self._fill.observe(kernel, min(num_rows / limit, 1.0) if limit > 0 else 1.0)
        self._predicted_s.observe(kernel, predicted_ms * 1e-3)
        self._actual_s.observe(kernel, measured_ms * 1e-3)
        self._waste.observe(kernel, padding / (1.0 + padding) if padding > 0.0 else 0.0)
        self._h2d_s.observe(kernel, get("h2d_ms", 0.0) * 1e-3)
        self._compute_s.observe(kernel, get("compute_ms", 0.0) * 1e-3)
        self._d2h_s.observe(kernel, get("d2h_ms", 0.0) * 1e-3)

    def rows_ended(
        self, kernel: str, outcome: str, client: str, num_rows: int, e2e_s: float, queue_s: float | None = None
    ) -> None:
        """Rows of one run have their outcome together.

        Args:
            outcome: done, failed, expired, cancelled or dead.
            client: its name, not its principal.
            e2e_s: since their arrival; queue_s: from arrival to the worker, None if they never got to one.
        """
        self._requests.add((kernel, outcome, client), num_rows)
        if outcome in ("done", "failed"):
            self._e2e_s.observe(kernel, e2e_s, num_rows)
        if queue_s is not None:
            self._queue_s.observe(kernel, queue_s, num_rows)

    def refused(self, code: str, reason: str, num_rows: int) -> None:
        """A submission was not taken. `code` is the wire's, `reason` a fixed word for what was short, or empty."""
        self._rejections.add((code, reason or code), num_rows)

    def cancelled(self, stage: str, num_rows: int) -> None:
        """`stage`: queued or running."""
        self._cancelled.add((stage,), num_rows)

    def deadline_missed(self, stage: str, num_rows: int) -> None:
        """`stage`: queued, running, or hopeless: dropped because it could not finish in time."""
        self._missed.add((stage,), num_rows)

    def device_time(self, client: str, ms: float) -> None:
        """What a client's share of a batch took on the device, told once, when it is measured."""
        if ms > 0.0:
            self._device_s.add((client,), ms * 1e-3)

    def loaded(self, kernel: str, ms: float) -> None:
        """A worker has loaded a kernel."""
        self._load_s.observe(kernel, ms * 1e-3)

    # --- reading ---------------------------------------------------------------------------------------------------

    def render(self, gauges: Gauges) -> str:
        """Everything in Prometheus text format 0.0.4."""
        recorded: tuple[Counts | Histogram, ...] = (
            self._requests, self._rejections, self._device_s, self._cancelled, self._missed, self._queue_s, self._e2e_s,
            self._batch_rows, self._fill, self._predicted_s, self._actual_s, self._waste, self._h2d_s, self._compute_s,
            self._d2h_s, self._load_s,
        )  # fmt: skip
        return "".join([*(metric.render() for metric in recorded), *_gauges(gauges)])


class NoMetrics(Metrics):
    """Where nobody can ask: recording costs a call."""

    def _ignore(self, *_: Any, **__: Any) -> None:
        return

    batch_completed = rows_ended = refused = cancelled = deadline_missed = device_time = loaded = _ignore


def _gauges(g: Gauges) -> Iterable[str]:
    depth = {(kernel, name, str(priority)): rows for (kernel, name, priority), rows in g.queue_depth.items()}
    edges = ((kernel, str(n), edge) for kernel, edges in g.bin_edges_s.items() for n, edge in enumerate(edges, 1))
    edge_s = {(kernel, n): edge for kernel, n, edge in islice(edges, MAX_LABEL_SETS)}
    memory = {(worker, kind): size for worker, said in g.memory.items() for kind, size in _bytes(said).items()}
    pair = ("kernel", "device")
    yield _family("queue_depth", "Queued tasks.", ("kernel", "bin", "priority"), depth, sum)
    yield _family("queue_oldest_age_seconds", "Age of the oldest queued task.", (), {(): g.queue_oldest_age_s})
    yield _family("admission_queued_seconds", "Predicted work that is queued.", (), {(): g.admission_queued_s})
    yield _family("bin_edge_seconds", "Boundaries between a kernel's bins.", ("kernel", "edge"), edge_s)
    yield _family("prediction_error_ratio", "Mean of |measured - predicted| / measured.", pair, g.prediction_error, max)
    yield _family("prediction_coverage_ratio", "Share of batches within their q95.", pair, g.prediction_coverage, min)
    state = dict.fromkeys(g.workers, 1)
    yield _family("worker_state", "1 for the state that a worker is in.", ("worker", "device", "state"), state)
    yield _family("worker_restarts_total", "Workers that were lost.", (), {(): g.workers_lost}, kind="counter")
    yield _family("device_memory_bytes", "Memory as workers report it.", ("worker", "kind"), memory)
    breakers = dict.fromkeys(g.breakers_open, 1)
    yield _family("breaker_open", "1 where a worker gets no work of a kernel.", ("worker", "kernel"), breakers, sum)
    events = {(kind,): count for kind, count in g.events.items()}
    yield _family("events_total", "Decisions worth telling.", ("kind",), events, sum, kind="counter")
    yield _family("longest_turn_seconds", "The longest turn of the broker's loop.", (), {(): g.longest_turn_s})
    yield from _shared(g.shared) if g.shared else ()
    yield _family("clients", "Client sessions.", (), {(): g.clients})
    yield _family("tasks_open", "Tasks queued or running.", (), {(): g.tasks_open})
    yield _family("uptime_seconds", "Since the broker's start.", (), {(): g.uptime_s})


def _shared(said: Mapping[str, Any]) -> Iterable[str]:
    yield _family("shared_segments", "Open segments of shared memory.", (), {(): said["segments"]})
    yield _family("shared_segment_bytes", "Their bytes.", (), {(): said["segment_bytes"]})
    yield _family("shared_loans", "Rows in them that somebody may still read.", (), {(): said["loans"]})
    yield _family("shared_rows_total", "Rows that came by descriptor.", (), {(): said["rows"]}, kind="counter")
    yield _family("shared_row_bytes_total", "Their bytes.", (), {(): said["row_bytes"]}, kind="counter")
    fallbacks = {(reason,): count for reason, count in said["fallbacks"].items()}
    yield _family("shared_fallbacks_total", "Rows that did not.", ("reason",), fallbacks, sum, kind="counter")


Merge = Callable[[Iterable[float]], float]


def _family(
    name: str, text: str, label_names: Labels, values: Mapping[Any, float], merge: Merge | None = None, kind: str = "gauge"
) -> str:
    """A family. With `merge` it has at most `MAX_LABEL_SETS` label sets: what is more becomes one, `other`."""
    if merge is not None and len(values) >= MAX_LABEL_SETS:
        entries = list(values.items())
        values, rest = dict(entries[: MAX_LABEL_SETS - 1]), entries[MAX_LABEL_SETS - 1 :]
        values[(OTHER,) * len(label_names)] = merge(value for _, value in rest)
    return exposition.family(PREFIX + name, kind, text, label_names, values)


def _bytes(said: Mapping[str, Any]) -> dict[str, float]:
    """The sizes in a heartbeat, without the unit in their names."""
    sizes = {k.removesuffix("_bytes"): v for k, v in said.items() if type(v) in (int, float) and k.endswith("_bytes")}
    return dict(list(sizes.items())[:MAX_MEMORY_KINDS])
