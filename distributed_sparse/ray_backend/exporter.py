"""MetricsExporter: exports the engine's metrics through Ray, which serves them to Prometheus on every node."""

from __future__ import annotations

import logging
import threading

from ray.util import metrics as ray_metrics

from distributed_sparse.driver.engine_metrics import METRICS
from distributed_sparse.driver.service import DriverService

logger = logging.getLogger(__name__)

EXPORT_INTERVAL_S = 1.0
MODEL_TAG = "model_name"
"""Label of the model on every metric; vLLM's name."""


class MetricsExporter:
    """Exports every `EXPORT_INTERVAL_S` from a thread of its own, so no step waits. Lives in the Driver's actor.

    Args:
        service: the source of the metrics; each value is exported once.
        model: the value of the label `model_name`.
    """

    def __init__(self, service: DriverService, model: str) -> None:
        self._service = service
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._histograms: dict[str, ray_metrics.Histogram] = {}
        self._labels = {metric.name: metric.label for metric in METRICS}
        for metric in METRICS:
            named = (metric.name, metric.description)
            keys = (MODEL_TAG, metric.label) if metric.label else (MODEL_TAG,)
            made: ray_metrics.Metric
            if metric.kind == "histogram":
                made = self._histograms[metric.name] = ray_metrics.Histogram(*named, list(metric.boundaries), keys)
            elif metric.kind == "gauge":
                made = self._gauges[metric.name] = ray_metrics.Gauge(*named, keys)
            else:
                made = self._counters[metric.name] = ray_metrics.Counter(*named, keys)
            made.set_default_tags({MODEL_TAG: model})
        service.metrics()  # starts the recording
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Export the remaining values and end the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(EXPORT_INTERVAL_S)
            try:
                self._export()
            except Exception:
                logger.exception("some metrics were not exported")

    def _export(self) -> None:
        gauges, readings = self._service.metrics()
        for name, value in gauges.items():
            self._gauges[name].set(value)
        for name, values in readings.observed.items():
            for value in values:
                self._histograms[name].observe(value)
        for (name, label), amount in readings.counted.items():
            self._counters[name].inc(amount, {self._labels[name]: label} if label else {})
