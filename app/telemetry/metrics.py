"""The metrics of the service, for Prometheus. Only this file imports its client. It knows names and numbers and nothing else.

To count is an addition to a dictionary of this process. Prometheus' own values take the sums over before each scrape and,
where several processes share them in files, a moment after they have changed: its calls would cost a plain retry twenty times
as much. No label holds the id of a run, an organization, a key or a machine, so the number of series is bounded.

One file: the list of all metrics is half of it, and the other half is what makes counting cheap.
"""

import asyncio
import os
import platform
import tempfile
import time
import weakref
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from app import __version__

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

prometheus_client.disable_created_metrics()  # they would double the number of series

# The variable by which Prometheus' client knows, when it is imported, that several processes count together.
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# How long a sum may wait to be written to the shared files. A scrape in another process waits a little longer.
SHARED_SECONDS = 0.02
_SETTLED_SECONDS = 2.5 * SHARED_SECONDS

# How long a page that one client has not read yet may be given to other clients.
SHARED_PAGE_SECONDS = 1.0

# Bounds of OpenTelemetry's conventions for HTTP.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
# Bounds of the conventions for databases. Each statement has a dozen series.
_STATEMENT_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
_LONG_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400)

# Combinations of method, route and status with series of their own. A client that tries all combinations makes no more.
MOST_ROUTES = 200

Labels = tuple[str, ...]
Readings = Mapping[str, Mapping[Labels, float]]


class _Family:
    """Sums that wait to be taken over, by the values of the labels."""

    def __init__(self, name: str, says: str, *labels: str, most: int | None = None) -> None:
        self.name, self.says, self.labels = name, says, labels
        self._most = most
        _FAMILIES.append(self)

    def take_over(self) -> None:
        """Into Prometheus' own values."""
        raise NotImplementedError

    def bounded(self, values: Labels) -> Labels:
        """These values, or those that stand for all others when there are too many. Each is asked about once."""
        if self._most is None or _shared.has_room(self.name, values, self._most):
            return values
        return ("_OTHER", *("" for _ in values[1:-1]), values[-1])


_FAMILIES: list[_Family] = []


class _Counter(_Family):
    """A count that only grows."""

    def __init__(self, name: str, says: str, *labels: str) -> None:
        super().__init__(name, says, *labels)
        self._waiting: dict[Labels, float] = {}
        self._children: dict[Labels, prometheus_client.Counter] = {}
        self._metric: prometheus_client.Counter | None = None

    def add(self, *values: str, count: float = 1) -> None:
        if _shared.is_off:
            return
        self._waiting[values] = self._waiting.get(values, 0) + count
        if not _shared.is_due:
            _shared.come_soon()

    def take_over(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for values, count in waiting.items():
            child = self._children.get(values)
            if child is None:
                if self._metric is None:
                    self._metric = prometheus_client.Counter(
                        self.name, self.says, self.labels, registry=_shared.registry
                    )
                child = self._children[values] = self._metric.labels(*values) if values else self._metric
            child.inc(count)


class _Histogram(_Family):
    """How long things took."""

    def __init__(
        self, name: str, says: str, *labels: str, bounds: tuple[float, ...] = _SECONDS, most: int | None = None
    ) -> None:
        super().__init__(name, says, *labels, most=most)
        self._bounds = bounds
        self._waiting: dict[Labels, list[float]] = {}
        # Observations of no time at all, without labels. The code that observes them adds here; a call would cost more.
        self.at_once = 0
        self._children: dict[Labels, prometheus_client.Histogram] = {}
        self._metric: prometheus_client.Histogram | None = None

    def observe(self, seconds: float, *values: str) -> None:
        if _shared.is_off:
            return
        tally = self._waiting.get(values)
        if tally is None:
            tally = self._waiting[values] = self._nothing()
        tally[bisect_left(self._bounds, seconds)] += 1
        tally[-1] += seconds
        if not _shared.is_due:
            _shared.come_soon()

    def begin(self, *values: str) -> None:
        """Show it before there is anything in it."""
        self._waiting.setdefault(values, self._nothing())

    def _nothing(self) -> list[float]:
        return [0.0] * (len(self._bounds) + 2)  # one for each bound, one above all of them, and the sum

    def take_over(self) -> None:
        if self.at_once:
            self._waiting.setdefault((), self._nothing())[0] += self.at_once
            self.at_once = 0
        waiting, self._waiting = self._waiting, {}
        for values, (*counts, total) in waiting.items():
            child = self._children.get(values)
            if child is None:
                child = self._children[values] = self._child(self.bounded(values))
            _add(child, counts, total)

    def _child(self, values: Labels) -> prometheus_client.Histogram:
        if self._metric is None:
            self._metric = prometheus_client.Histogram(
                self.name, self.says, self.labels, registry=_shared.registry, buckets=self._bounds
            )
        return self._metric.labels(*values) if values else self._metric


def _add(histogram: prometheus_client.Histogram, counts: Sequence[float], total: float) -> None:
    """What `observe` does, for many observations at once: there is no public call for it (tests/test_private_parts.py)."""
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
    histogram._sum.inc(total)


class _Gauge(_Family):
    """A value as of now: over all live processes the sum, the greatest value, or the latest that was set."""

    def __init__(
        self, name: str, says: str, *labels: str, of: Literal["livesum", "livemin", "max", "livemostrecent"] = "livesum"
    ) -> None:
        super().__init__(name, says, *labels)
        self._mode: Literal["livesum", "livemin", "max", "livemostrecent"] = of
        self._now: dict[Labels, float] = {}
        self._metric: prometheus_client.Gauge | None = None
        self._read: Callable[[], Mapping[Labels, float]] | None = None

    def set(self, value: float, *values: str) -> None:
        if _shared.is_off:
            return
        self._now[values] = value
        if not _shared.is_due:
            _shared.come_soon()

    def read_from(self, read: Callable[[], Mapping[Labels, float]]) -> None:
        """Ask this before a scrape, instead of being told."""
        self._read = read

    def take_over(self) -> None:
        now = self._now if self._read is None else self._read()
        for values, value in now.items():
            if self._metric is None:
                self._metric = prometheus_client.Gauge(
                    self.name,
                    self.says,
                    self.labels,
                    registry=_shared.registry,
                    multiprocess_mode=self._mode,
                )
            (self._metric.labels(*values) if values else self._metric).set(value)


class _Shared:
    """Prometheus' own values, of this process or of all of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # As the client has decided when it was imported.
        self.folder = Path(os.environ[_FOLDER]) if _FOLDER in os.environ else None
        # Whether sums will be taken over by themselves, or need not be before the next scrape.
        self.is_due = self.folder is None
        self.is_off = False  # no scrape will ever come
        self._known: set[tuple[str, Labels]] = set()

    def come_soon(self) -> None:
        """Take the waiting sums over after SHARED_SECONDS."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # in a thread, or before the loop runs: the next one who counts sees to it
        self.is_due = True
        loop.call_later(SHARED_SECONDS, self._come)

    def _come(self) -> None:
        self.is_due = False
        take_over()

    def has_room(self, name: str, values: Labels, most: int) -> bool:
        """Whether these values may have series of their own: the first `most` may, counted over all processes."""
        if self.folder is None:
            self._known.add((name, values))
            return len(self._known) <= most
        mark = self.folder / f"{name}:{':'.join(values).replace('/', '|')}"
        if not mark.exists() and sum(1 for _ in self.folder.glob(f"{name}:*")) < most:
            mark.touch()
        return mark.exists()


_shared = _Shared()

# --- what there is ----------------------------------------------------------------------------------------------------

requests = _Histogram(
    "http_server_request_duration_seconds",
    "Requests, from their head to the end of their reply. A long poll takes as long as it waits.",
    "http_request_method",
    "http_route",
    "http_response_status_code",
    most=MOST_ROUTES,
)
active_requests = _Gauge("http_server_active_requests", "Requests that are being answered.")
build_info = _Gauge("runs_build_info", "The version that serves; always 1.", "version", "python", of="max")
retries = _Counter(
    "runs_retries_total", "Retries that were asked for, by whom, and what came of them.", "outcome", "code", "by"
)
planned_retries = _Counter(
    "runs_planned_retries_total", "Retries by workflows' policies: planned, done, dropped or void.", "outcome", "code"
)
transitions = _Counter("runs_transitions_total", "Changes of a run's status, and by whom.", "to", "by")
placement_wait = _Histogram("runs_placement_wait_seconds", "From queueing a run to its machine.", bounds=_LONG_SECONDS)
store_calls = _Histogram(
    "runs_store_call_duration_seconds",
    "Calls to Vault and the file store, with the wait for a free slot.",
    "store",
    "operation",
    "outcome",
)
statements = _Histogram(
    "db_client_operation_duration_seconds",
    "Statements sent to PostgreSQL, by name.",
    "db_query_summary",
    bounds=_STATEMENT_SECONDS,
)
connections = _Gauge("db_client_connection_count", "Connections to PostgreSQL that are open.", "state")
commits_given_up = _Counter(
    "runs_commits_given_up_total",
    "Commits that were not confirmed in time or lost their connection: their outcome is unknown.",
)
dependency_up = _Gauge(
    "runs_dependency_up",
    "1 if the last check of a store found that it can be used, else 0.",
    "store",
    of="livemin",
)
disk_is_full = _Gauge(
    "runs_disk_is_full",
    "1 while the disk of a store has no room for writes, else 0.",
    "store",
    of="livemostrecent",
)
silence_limit = _Gauge(
    "runs_silence_limit_seconds",
    "RUN_SILENCE_SECONDS, or 3600 while it is off: without a report for longer, a running run counts as abandoned.",
    of="max",
)
clock_offset = _Gauge(
    "runs_clock_offset_seconds",
    "How far the database's clock is ahead of this machine's.",
    of="livemostrecent",
)
pool_wait = _Histogram("runs_pool_wait_seconds", "Waits for a connection of the pool.")
set_size = _Histogram(
    "runs_set_size",
    "Calls that went together through one statement, by what they wanted.",
    "what",
    bounds=(1, 2, 4, 8, 16, 32, 64),
)
idempotency = _Counter("runs_idempotency_total", "Writes with an Idempotency-Key.", "outcome")
quota_refusals = _Counter("runs_quota_refusals_total", "Requests over a quota.", "policy")
in_flight_bytes = _Gauge("runs_in_flight_bytes", "Bytes of bodies and replies that requests hold.")
deletions = _Counter("runs_deletions_total", "Names deleted in Vault and in the file store.", "store")
deletions_failed = _Counter("runs_deletions_failed_total", "Deletions that failed and are tried again.", "store")
loop_success = _Gauge(
    "runs_background_last_success_timestamp_seconds",
    "When a background loop last ended a round without a failure.",
    "loop",
    of="max",
)
loop_failures = _Counter("runs_background_failures_total", "Rounds of a background loop that failed.", "loop", "code")
scrape_errors = _Counter("runs_scrape_errors_total", "Scrapes without what only the database knows.")
dispatches = _Counter("runs_dispatches_total", "What Temporal was told, and what came of it.", "kind", "outcome")
webhook_deliveries = _Counter("runs_webhook_deliveries_total", "Attempts to deliver a webhook.", "outcome")

# Gauges from the database, for the whole service and not for a process.
FROM_DATABASE: dict[str, tuple[str, Labels]] = {
    "runs_waiting": ("Runs that wait for a machine, counted up to 100,000.", ("reason",)),
    "runs_oldest_waiting_age_seconds": ("How long the oldest of them has waited.", ()),
    "runs_held": ("Runs that are held until their not_before, counted up to 100,000.", ()),
    "runs_running": ("Runs that their executors work on, counted up to 100,000.", ()),
    "runs_silent": ("Running runs that should have reported again by now, counted up to 10,000.", ()),
    "runs_oldest_silent_age_seconds": ("How long a running run has had no report, at most.", ()),
    "runs_machines": ("Machines, counted up to 20,000.", ("state",)),
    "runs_deletions_pending": ("Names that are due to be deleted, counted up to 100,000.", ("store",)),
    "runs_deletions_oldest_age_seconds": ("Since when the oldest of them has been due.", ("store",)),
    "runs_planned_retries": ("Retries that policies have planned, counted up to 10,000.", ()),
    "runs_planned_retries_oldest_overdue_seconds": ("How long ago the oldest of them was due.", ()),
    "runs_dispatches_pending": ("What Temporal is still to be told, counted up to 10,000.", ()),
    "runs_dispatches_oldest_age_seconds": ("Since when the oldest of it has waited.", ()),
    "runs_webhook_oldest_pending_age_seconds": ("Since when the oldest webhook has waited to be delivered.", ()),
}

# --- counting where there is more to it than a name -------------------------------------------------------------------

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def request(method: str, route: str, status: int, seconds: float) -> None:
    """A request was answered. `route` is its template, empty if it has none."""
    requests.observe(seconds, method if method in _METHODS else "_OTHER", route, str(status))


# --- showing ----------------------------------------------------------------------------------------------------------


def take_over() -> None:
    """Bring Prometheus' own values up to date with what was counted in this process."""
    for family in _FAMILIES:
        family.take_over()


def turn_off() -> None:
    """Stop counting in this process: it shows no metrics."""
    _shared.is_off = True


def begin() -> None:
    """Show from the start what is known beforehand: of a series that appears with its first failure no rate can be told."""
    build_info.set(1, __version__, platform.python_version())
    commits_given_up.add(count=0)
    for outcome in ("accepted", "replayed"):
        retries.add(outcome, "", "request", count=0)
    retries.add("accepted", "", "bulk", count=0)
    retries.add("accepted", "", "policy", count=0)
    for outcome in ("planned", "retried", "void"):
        planned_retries.add(outcome, "", count=0)
    for store in ("database", "storage"):
        disk_is_full.set(0, store)
    for store in ("vault", "files"):
        deletions.add(store, count=0)
        deletions_failed.add(store, count=0)
    for outcome in ("first", "replayed", "in_progress", "mismatch"):
        idempotency.add(outcome, count=0)
    for outcome in ("delivered", "retried", "failed"):
        webhook_deliveries.add(outcome, count=0)
    for kind, outcome in (("start", "started"), ("start", "failed"), ("cancel", "cancelled"), ("cancel", "failed")):
        dispatches.add(kind, outcome, count=0)
    for to, by in (("scheduling", "caller"), ("assigned", "service"), ("running", "executor"), ("success", "executor")):
        transitions.add(to, by, count=0)
    for to, by in (("error", "executor"), ("error", "silence"), ("error", "machine_deleted"), ("cancelled", "caller")):
        transitions.add(to, by, count=0)
    transitions.add("task_failed", "executor", count=0)
    scrape_errors.add(count=0)
    placement_wait.begin()
    pool_wait.begin()


class _Gauges(Collector):
    """What only the database knows, as it was read last."""

    def __init__(self, found: Readings) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        for name, values in self._found.items():
            says, labels = FROM_DATABASE[name]
            family = GaugeMetricFamily(name, says, labels=labels)
            for found, value in values.items():
                family.add_metric(found, value)
            yield family


class _Text(bytearray):
    """A page. Unlike bytes, it can have a weak reference, which tells whether a client still reads it."""


class Exposition:
    """The text that a scrape gets.

    Any client may scrape and then read nothing. So while a client still reads a page, all clients that ask within a second get
    the same page. At most one page is in memory for each second that a reply may wait, whatever clients do. A single client
    has read its last page when it asks again, and always gets a new one.
    """

    def __init__(self) -> None:
        self._making: asyncio.Task[_Text] | None = None
        self._last: Callable[[], _Text | None] = lambda: None
        self._shared_until = self._rests_until = 0.0  # in time.monotonic()

    async def text(self, read: Callable[[], Awaitable[Readings]]) -> memoryview:
        """The page as of now, or the page that other clients are reading, which is at most SHARED_PAGE_SECONDS old."""
        page = self._last()
        if page is None or time.monotonic() >= self._shared_until:
            if self._making is None:
                self._making = asyncio.create_task(self._make(read))
            page = await asyncio.shield(self._making)
        return memoryview(page)

    async def _make(self, read: Callable[[], Awaitable[Readings]]) -> _Text:
        try:
            await asyncio.sleep(self._rests_until - time.monotonic())
            found = await read()
            if _shared.folder is not None:
                await asyncio.sleep(_SETTLED_SECONDS)  # by now other processes have written their sums
            began = time.monotonic()
            take_over()
            page = _Text(await asyncio.to_thread(_page, found))
            now = time.monotonic()
            self._rests_until = now + 2 * (now - began)
            self._shared_until = now + SHARED_PAGE_SECONDS
            self._last = weakref.ref(page)
            return page
        finally:
            self._making = None


def _page(found: Readings) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Gauges(found))
    if _shared.folder is None:
        return generate_latest(_shared.registry) + generate_latest(registry)
    _forget_the_dead(_shared.folder)
    MultiProcessCollector(registry, path=str(_shared.folder))
    return generate_latest(registry)


def _forget_the_dead(folder: Path) -> None:
    """Drop the live gauges of processes that are gone. Their counts stay."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, path=str(folder))
        except PermissionError:
            pass


# --- several processes ------------------------------------------------------------------------------------------------


def share(workers: int) -> None:
    """Before the processes start: an empty folder for what they count together, named by PROMETHEUS_MULTIPROC_DIR or a new
    one. Raises OSError."""
    if workers == 1 and _FOLDER not in os.environ:
        return
    folder = Path(os.environ.get(_FOLDER) or tempfile.mkdtemp(prefix="runs-metrics-"))
    os.environ[_FOLDER] = str(folder)
    if _shared.folder is not None:  # this process is the one that serves, too
        _shared.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob("*_[0-9]*.db"), *folder.glob("*:*")):
        left.unlink()
