"""The one place where logging is set up: standard error; colours only on terminals."""

import logging
import sys

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_OURS = (
    *("baton", "baton_launch", "baton_router", "baton_prefill_service", "baton_decode_service"),
    *("baton_both_service", "baton_kv_transfer", "baton_kernels"),
)


def set_up_logging(level: str = "info") -> None:
    """Log Baton's lines from this level of RouterConfig.log_level up. The services call no `basicConfig`.

    Libraries' lines are logged from INFO up at most: what they say below is of no use to anybody here.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(stderr=True),
            show_path=False,
            omit_repeated_times=False,
            log_time_format=TIME_FORMAT,
        )
        handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", datefmt=TIME_FORMAT)
        )
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(least, logging.INFO), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(least)
    # uvicorn's "started" and "shutting down" say nothing new, and its warnings are of what clients send: they
    # are told, and the log is not theirs to fill.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
