"""The one place where logging is set up: standard error; colours only on terminals."""

import logging
import sys


def set_up_logging() -> None:
    """Log from INFO up. The services call no `basicConfig` of their own."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(name)s %(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%H:%M:%S")
        )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # uvicorn's "started" and "shutting down" say nothing new, and its warnings are of what clients send: they
    # are told, and the log is not theirs to fill.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
