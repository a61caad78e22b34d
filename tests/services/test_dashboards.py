"""What deploy/ asks Prometheus for is what a router exports."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.registry import Collector

from baton_launch import top_figures
from baton_router.pool_metrics import PoolCollector
from tests.services.cluster import cluster
from tests.services.prompts import prompt_of
from tools.grafana_dashboard import FILE, expressions, text

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
TOP = Path(top_figures.__file__).read_text()
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


async def exported() -> dict[str, set[str]]:
    """Names of all series of a router that has answered a request, with the labels that they had."""
    async with cluster() as running:
        collector: Collector = PoolCollector(running.pool, running.admission)
        running.metrics.registry.register(collector)
        running.metrics.http_requests.labels(endpoint="/x", status="200").inc()
        await running.ask(running.request(prompt_of(40)))
        await running.all_clean()
        metrics = list(running.metrics.registry.collect())
    names = {metric.name + suffix: set[str]() for metric in metrics for suffix in SUFFIXES[metric.type]}
    for sample in (sample for metric in metrics for sample in metric.samples):
        if sample.name in names:
            names[sample.name] |= set(sample.labels)
    return names


async def test_every_series_and_label_is_there() -> None:
    names = await exported()
    for expression in (*expressions(), *(rule["expr"] for rule in RULES)):
        asked = re.findall(r"baton_\w+", expression)
        assert asked, expression
        assert set(asked) <= set(names), expression
        labels = {
            label.strip() for group in re.findall(r"by \(([^)]+)\)", expression) for label in group.split(",")
        }
        assert labels <= set.union(*(names[name] for name in asked)), expression


async def test_every_series_of_baton_top_is_there() -> None:
    asked = set(re.findall(r"\"(baton_\w+)\"", TOP))
    assert len(asked) > 10
    names = await exported()
    assert {name for name in asked if name not in names and f"{name}_bucket" not in names} == set()


def test_the_dashboard_is_what_the_table_says() -> None:
    assert FILE.read_text() == text(), "python -m tools.grafana_dashboard writes it"


def test_alerts_say_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description"} <= set(rule["annotations"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus's promtool")
def test_prometheus_takes_them() -> None:
    for kind, name in (("rules", "alerts.yaml"), ("config", "prometheus.yaml")):
        subprocess.run(["promtool", "check", kind, name], cwd=PROMETHEUS, check=True, capture_output=True)
