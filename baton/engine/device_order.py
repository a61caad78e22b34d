"""What an engine tells of pages on a device comes true a little later: here it waits until it has."""

import queue
import threading
from collections.abc import Callable

from baton.core.commands import EngineOutput
from baton.core.ports import DevicePages, Mark


class DeviceOrder:
    """Passes an engine's outputs on, in order, each once the device has done what it speaks of.

    Steps are queued on the device, and told of before it has run them. Pages that are ready to leave must not
    be read before they are written; and pages that were given to a reservation must not be filled while the
    device may still be at a step of those who had them before. The engine itself goes on meanwhile.
    """

    def __init__(
        self,
        pages: DevicePages,
        forward: Callable[[EngineOutput], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """`forward` and `on_error` are called on a thread of this one's own; after an error comes nothing."""
        self._pages = pages
        self._forward = forward
        self._on_error = on_error
        # Bounded by the steps that the engine queues ahead of the device.
        self._outputs: queue.SimpleQueue[tuple[EngineOutput, Mark | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device-order", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, output: EngineOutput) -> None:
        """Take an output; on the engine's thread, right after what it speaks of was queued on the device."""
        speaks_of_pages = output.pages or output.reserved
        self._outputs.put((output, self._pages.mark() if speaks_of_pages else None))

    def stop(self) -> None:
        """End the thread when all that was put is passed on."""
        self._outputs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._outputs.get()) is not None:
            output, mark = item
            try:
                if mark is not None:
                    mark.wait()
            except Exception as error:  # what CUDA raises has no other base
                self._on_error(error)
                return
            self._forward(output)
