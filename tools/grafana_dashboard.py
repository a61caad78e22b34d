"""Writes deploy/grafana/dashboards/baton.json: `python -m tools.grafana_dashboard`.

A panel is a row of the table below; everything that Grafana wants beside is the same for all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "baton.json"
_WIDTH, _HEIGHT, _PER_LINE = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph: what it shows, in which unit of Grafana's, and what it asks Prometheus, by legend."""

    title: str
    unit: str
    queries: Mapping[str, str]
    text: str = ""


def _quantiles(metric: str) -> dict[str, str]:
    rates = f"sum by (le) (rate({metric}_bucket[$__rate_interval]))"
    return {f"p{share}": f"histogram_quantile(0.{share}, {rates})" for share in (50, 95, 99)}


def _rate(metric: str, *by: str) -> str:
    groups = f" by ({', '.join(by)}) " if by else ""
    return f"sum{groups}(rate({metric}[$__rate_interval]))"


def _rates(metric: str, *by: str) -> dict[str, str]:
    """A line for each of the labels' values."""
    return {" ".join(f"{{{{{label}}}}}" for label in by): _rate(metric, *by)}


_MEAN = "rate({0}_sum[$__rate_interval]) / rate({0}_count[$__rate_interval])"

ROWS: Mapping[str, Sequence[Panel]] = {
    "Clients": (
        Panel("Time to first token", "s", _quantiles("baton_time_to_first_token_seconds")),
        Panel("Time between tokens", "s", _quantiles("baton_inter_token_latency_seconds")),
        Panel("Whole requests", "s", _quantiles("baton_request_duration_seconds")),
        Panel(
            "Tokens a second",
            "short",
            {
                "prompt": _rate("baton_prompt_tokens_total"),
                "generated": _rate("baton_generation_tokens_total"),
            },
        ),
        Panel(
            "Why choices end",
            "reqps",
            {"{{finished_reason}}": _rate("baton_finished_choices_total", "finished_reason")},
        ),
        Panel("HTTP by status", "reqps", _rates("baton_http_requests_total", "status")),
        Panel("Prompt lengths", "short", _quantiles("baton_request_prompt_tokens")),
        Panel("Answer lengths", "short", _quantiles("baton_request_generation_tokens")),
        Panel(
            "Where a request's time goes",
            "s",
            {
                stage: _MEAN.format(f"baton_request_{stage}_seconds")
                for stage in ("queue", "prefill", "decode")
            },
            "Means: in the router's queue, until the first token, until the last one.",
        ),
    ),
    "Router": (
        Panel("Waiting requests", "short", {"in the queue": "sum(baton_queue_requests)"}),
        Panel("Refused requests", "reqps", {"refused": _rate("baton_refused_requests_total")}),
        Panel(
            "Requests tried again",
            "reqps",
            _rates("baton_retries_total", "reason"),
            "Their clients saw nothing of it but a pause.",
        ),
    ),
    "Workers": (
        Panel("Connected", "short", {"{{role}}": "sum by (role) (baton_worker_up)"}),
        Panel("Sequences that run", "short", {"{{role}} {{worker}}": "baton_worker_num_running"}),
        Panel(
            "KV pages held",
            "percentunit",
            {"{{role}} {{worker}}": "1 - baton_worker_num_free_blocks / baton_worker_num_blocks"},
        ),
        Panel(
            "Prefix cache, share of prompt tokens found",
            "percentunit",
            {
                "{{role}}": f"{_rate('baton_worker_prefix_cache_hits_total', 'role')} / "
                f"{_rate('baton_worker_prefix_cache_queries_total', 'role')}"
            },
        ),
        Panel(
            "Preemptions",
            "short",
            {"{{role}} {{worker}}": _rate("baton_worker_num_preemptions_total", "role", "worker")},
        ),
        Panel("Requests that wait on workers", "short", {"{{role}} {{worker}}": "baton_worker_num_waiting"}),
    ),
    "Handovers": (
        Panel("KV sent", "Bps", _rates("baton_worker_transport_bytes_total", "transport")),
        Panel(
            "Time of a transfer",
            "s",
            {
                part: f"{_rate(f'baton_worker_transport_{part}_seconds_total')} / "
                f"{_rate('baton_worker_transport_transfers_total')}"
                for part in ("hidden", "exposed")
            },
            "Hidden: while the prompt was still computed. Exposed: what the request waited for.",
        ),
        Panel(
            "Transfers by outcome", "ops", {"{{outcome}}": _rate("baton_worker_transfers_total", "outcome")}
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": _WIDTH * _PER_LINE, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": place, "collapsed": False, "panels": []})
        for index, panel in enumerate(row):
            line, column = divmod(index, _PER_LINE)
            place = {"x": column * _WIDTH, "y": top + 1 + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_graph(panel, place))
        top += 1 + -(-len(row) // _PER_LINE) * _HEIGHT
    return {
        "title": "Baton",
        "uid": "baton",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": [panel | {"id": number} for number, panel in enumerate(panels, 1)],
    }


def expressions() -> list[str]:
    """All that the panels ask Prometheus."""
    return [query for row in ROWS.values() for panel in row for query in panel.queries.values()]


def _graph(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
