"""The process of a worker of both roles."""

from baton.config import WorkerConfig
from baton.worker_process import run_worker
from baton_both_service.service import BothService


def run(config: WorkerConfig) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    run_worker(config, BothService)
