"""See health.py."""

from types import SimpleNamespace

HealthCheckResponse = SimpleNamespace(SERVING=1, NOT_SERVING=2)
