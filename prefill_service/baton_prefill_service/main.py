"""The prefill server's process."""

from baton.config import WorkerConfig
from baton.worker_process import run_worker
from baton_prefill_service.service import PrefillService


def run(config: WorkerConfig) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    run_worker(config, PrefillService)
