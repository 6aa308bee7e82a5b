"""What Prometheus is told; no label holds anything but the service's own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from sagittal.serve.jobs import State

_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The numbers of one service.

    Args:
        count: gives the number of jobs in each state, asked for at each scrape.
    """

    def __init__(self, count: Callable[[], dict[State, int]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sagittal_http_requests", "Requests answered", ("method", "route", "status"), registry=self.registry
        )
        self.upload_bytes = Counter("sagittal_upload_bytes", "Bytes of scans received", registry=self.registry)
        self.ended = Counter("sagittal_jobs_ended", "Jobs that ended", ("model", "state"), registry=self.registry)
        self.lost = Counter("sagittal_jobs_lost", "Attempts whose worker died", registry=self.registry)
        self.workers_started = Counter("sagittal_workers_started", "Worker processes begun", registry=self.registry)
        self.workers_ready = Gauge("sagittal_workers_ready", "Worker processes that take jobs", registry=self.registry)
        self.job_seconds = Histogram(
            "sagittal_job_seconds",
            "From claim to end of a job that was done",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_States(count))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _States:
    """Asks the store instead of counting along: what the database says is what is true."""

    def __init__(self, count: Callable[[], dict[State, int]]) -> None:
        self._count = count

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the jobs by state."""
        family = GaugeMetricFamily("sagittal_jobs", "Jobs that are kept, by state", labels=["state"])
        for state, number in self._count().items():
            family.add_metric([state], number)
        yield family
