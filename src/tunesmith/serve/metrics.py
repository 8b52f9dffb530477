"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from tunesmith.serve.gate import Answered
from tunesmith.serve.protocol import Engine

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of requests, and the state of the engine when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        labels = ("route", "status")
        self._requests = Counter("tunesmith_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "tunesmith_request_seconds", "Time to the end of an answer.", ("route",), registry=self.registry,
            buckets=_SECONDS,
        )  # fmt: skip

    def count(self, answered: Answered) -> None:
        """A listener of the gate."""
        route = answered.route or "none"  # never the path as it was asked: anybody can ask for a million of them
        self._requests.labels(route, str(answered.status)).inc()
        self._seconds.labels(route).observe(answered.seconds)

    def response(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        state = self._engine.state()
        yield GaugeMetricFamily("tunesmith_engine_up", "1 while the model can answer.", float(state.alive))
        yield GaugeMetricFamily("tunesmith_running", "Answers that are being written.", state.running)
        yield GaugeMetricFamily("tunesmith_waiting", "Requests that wait for a place.", state.waiting)
        yield GaugeMetricFamily("tunesmith_engine_rss_bytes", "Memory of the process of the model.", state.rss_bytes)
        yield CounterMetricFamily("tunesmith_engine_restarts", "Times the model was started again.", state.restarts)
        yield CounterMetricFamily("tunesmith_prompt_tokens", "Tokens read.", state.prompt_tokens)
        yield CounterMetricFamily("tunesmith_completion_tokens", "Tokens written.", state.completion_tokens)
