"""Sessions between the router and a worker in virtual time: ordered, lossless until they break."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tests.simulation.world import World


class WorkerEnd(Protocol):
    """What a worker does with its sessions."""

    is_dead: bool

    def session_ended(self, session: "Session") -> None:
        """Abort all that hung on it."""
        ...


class Session:
    """One session; each end finds out for itself that it has broken."""

    def __init__(self, world: "World", worker: Any, on_lost: Callable[["Session"], None]) -> None:
        self.worker = worker
        self.is_known_lost = False  # to the router
        self.is_ended = False  # to the worker
        self._world = world
        self._on_lost = on_lost
        self._is_broken = False
        self._command_arrives = 0.0
        self._event_arrives = 0.0

    def command(self, action: Callable[..., None], *arguments: object) -> None:
        """From the router: call a method of the worker, with this session first."""
        world = self._world
        self._command_arrives = max(self._command_arrives, world.now + world.hop())
        world.at(self._command_arrives, self._take_command, action, arguments)

    def event(self, action: Callable[..., None], *arguments: object) -> None:
        """From the worker: call something of the router's."""
        world = self._world
        self._event_arrives = max(self._event_arrives, world.now + world.hop())
        world.at(self._event_arrives, self._take_event, action, arguments)

    def cut(self, worker_notices: float, router_notices: float) -> None:
        """Break it; what is on its way is lost."""
        if not self._is_broken:
            self._is_broken = True
            self._world.after(worker_notices, self._end)
            self._world.after(router_notices, self._lose)

    def _take_command(self, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if not (self._is_broken or self.worker.is_dead):
            action(self, *arguments)

    def _take_event(self, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if not self._is_broken:
            action(*arguments)

    def _end(self) -> None:
        self.is_ended = True
        if not self.worker.is_dead:
            self.worker.session_ended(self)

    def _lose(self) -> None:
        self.is_known_lost = True
        self._on_lost(self)


class SessionHost:
    """Which session each of a worker's requests has (baton.rpc.sessions.SessionHost)."""

    def __init__(self) -> None:
        self.requests: dict[str, Session] = {}

    def begin(self, request_id: str, session: Session) -> None:
        """A request has come."""
        assert request_id not in self.requests
        self.requests[request_id] = session

    def send(self, request_id: str, action: Callable[..., None], *arguments: object) -> None:
        """Call something of the router's, with the request's session first, if there is one."""
        session = self.requests.get(request_id)
        if session is not None and not session.is_ended:
            session.event(action, session, *arguments)

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self.requests.pop(request_id, None)

    def orphans_of(self, session: Session) -> list[str]:
        """Requests of a session that has ended."""
        return [request_id for request_id, its in self.requests.items() if its is session]
