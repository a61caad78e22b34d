"""Which model the connected workers serve: only pages of one and the same may meet."""

from baton.core.errors import Unavailable
from baton.fingerprint import CONFIG_DIGEST_BYTES, FINGERPRINT_BYTES


class OneModel:
    """That of the first worker to come, until the last one has gone: a cluster may be given other weights."""

    def __init__(self, config_digest: bytes) -> None:
        """`config_digest`: of the model directory that the router has, which need not hold the weights."""
        self.fingerprint = b""
        self._config_digest = config_digest
        self._num_workers = 0

    def join(self, fingerprint: bytes) -> None:
        """Count a worker that serves this model. Raises Unavailable where it serves another one."""
        is_of_config = fingerprint[:CONFIG_DIGEST_BYTES] == self._config_digest
        if not is_of_config or len(fingerprint) != FINGERPRINT_BYTES:
            raise Unavailable("it serves another model than this router: give both the same --model")
        if self._num_workers and fingerprint != self.fingerprint:
            raise Unavailable("it has other weights than the workers that are connected: give all the same")
        self.fingerprint = fingerprint
        self._num_workers += 1

    def leave(self) -> None:
        """A worker that had joined has gone."""
        self._num_workers -= 1
