"""The decode server's process."""

from baton.config import WorkerConfig
from baton.worker_process import run_worker
from baton_decode_service.service import DecodeService


def run(config: WorkerConfig) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    run_worker(config, DecodeService)
