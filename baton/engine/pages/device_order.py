"""What an engine tells of pages on a device comes true a little later: here it waits until it has."""

import queue
import threading
from collections.abc import Callable

from baton.core.commands import EngineOutput


class DeviceOrder:
    """Passes an engine's outputs on, in order, each once the device has reached its mark.

    Layers of pages are told of when they are queued on the device, and must not be read before it has written
    them. The engine itself goes on meanwhile. What has no mark speaks of steps that were collected, which the
    device has ended: their pages may be read, and what they gave back may be filled by a transfer.
    """

    def __init__(
        self,
        forward: Callable[[EngineOutput], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """`forward` and `on_error` are called on a thread of this one's own; after an error comes nothing."""
        self._forward = forward
        self._on_error = on_error
        # Bounded by the steps that the engine queues ahead of the device.
        self._outputs: queue.SimpleQueue[EngineOutput | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device-order", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, output: EngineOutput) -> None:
        """Take an output; on the engine's thread."""
        self._outputs.put(output)

    def stop(self) -> None:
        """End the thread when all that was put is passed on."""
        self._outputs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (output := self._outputs.get()) is not None:
            try:
                if output.mark is not None:
                    output.mark.wait()
            except Exception as error:  # what CUDA raises has no other base
                self._on_error(error)
                return
            self._forward(output)
