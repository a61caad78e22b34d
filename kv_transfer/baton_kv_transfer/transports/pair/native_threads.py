"""Threads that wait in native code, and are ended before the interpreter is.

A thread that comes back from native code while the interpreter shuts down is unwound by force; C++ frames do
not survive that, and the process aborts. Threads that are no daemons are waited for, but nobody tells them to
end. So these are daemons, which are told to end and then waited for.
"""

import atexit
import threading
import time
from collections.abc import Callable

# A thread that takes longer than this to end is left behind at exit.
EXIT_TIMEOUT_S = 5.0

_stops: dict[threading.Thread, Callable[[], None]] = {}


def start(name: str, run: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run `run` on a thread; `stop`, called on any thread, makes it return soon."""

    def registered() -> None:
        try:
            run()
        finally:
            _stops.pop(thread, None)

    thread = threading.Thread(target=registered, name=name, daemon=True)
    _stops[thread] = stop
    thread.start()


@atexit.register
def _end_all() -> None:
    threads = list(_stops.items())
    for _, stop in threads:
        stop()
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    for thread, _ in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
