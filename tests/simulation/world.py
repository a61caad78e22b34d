"""Both servers, a router and some clients in virtual time; one schedule decides all that happens.

Everything that decides is production code: both handovers, transfers on both sides, frames as bytes, both
schedulers and pools. What stands between them in production, asyncio, gRPC and threads, is replaced by a
queue of events. It is checked as things happen that

- a page has one writer: the store knows of each page which transfer may write it, from the reservation to
  the commit, and refuses all others, and so does the engine (pages.py, engine.py);
- no page is given back while a call may write it, and none stays held in the end (decode_worker.py, again
  engine.py);
- whoever computes on K and V finds every byte right (runner.py), and every token is the oracle's (cases.py);
- every reservation leaves each of its states in time, measured from outside (decode_worker.py);
- what has been changed on its way is refused, and so is what is for another ticket or epoch;
- every request ends, and then nothing of it is left in any table (`check_idle`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from baton.core.commands import FailureReason
from baton.core.request import TokenEvent
from tests.simulation.calls import NOTICES, PushCall
from tests.simulation.cases import MAX_MODEL_LEN, Case, make_case
from tests.simulation.decode_worker import PagesMessage, VirtualDecode
from tests.simulation.pages import layout_of
from tests.simulation.prefill_worker import VirtualPrefill
from tests.simulation.push import Way
from tests.simulation.router import RECONNECT_DELAY_S, Flight, Router
from tests.simulation.schedule import LONG_STALLS, STALLS, WRITE_TIMES, Chaos, Fault, Schedule, Violation
from tests.simulation.sessions import SessionHost

MAX_EVENTS = 20_000
_WAYS = (
    (Way.FRAMES,),
    (Way.STREAMS,),
    (Way.SIDE,),
    (Way.READ,),
    (Way.FRAMES, Way.STREAMS, Way.SIDE, Way.READ),
    (Way.FRAMES,),
    (Way.STREAMS,),
    (Way.SIDE,),
)
_STEP_TIMES = (0.002, 0.0005, 0.01, 0.06)
_WIDE = 64  # tokens a step: as many as there are

Action = Callable[..., None]


class World:
    """One schedule. `count` says how often what happened; `trace`, if given, gets a line for each event."""

    def __init__(self, decisions: bytes, count: Counter[str], trace: list[str] | None = None) -> None:
        schedule = self.schedule = Schedule(decisions)
        self.hop = schedule.hop
        self.count = count
        self.now = 0.0
        self._trace = trace
        self._events: list[tuple[float, int, Action, tuple[object, ...]]] = []
        self._num_scheduled = 0
        self.faults = schedule.faults()
        self.receiver_lag = 0.0
        self.calls: list[PushCall] = []
        self._configure(schedule)
        self._chaos = sorted(
            (schedule.chaos() for _ in range(schedule.pick(0, 0, 1, 1, 2, 2, 3, 4))),
            key=lambda chaos: chaos[0],
        )
        self.flights: list[Flight] = []
        self._starts = [
            (index and schedule.byte() & 63, make_case(schedule.byte(), schedule.byte()))
            for index in range(schedule.pick(1, 2, 1, 2, 1, 1, 2, 3))
        ]
        self._starts.sort(key=lambda start: start[0])
        self._epoch = 1
        self.prefill = VirtualPrefill(self)
        self.decode = VirtualDecode(self, self._epoch)
        self.router = Router(self)
        self.router.connect()

    def _configure(self, schedule: Schedule) -> None:
        ways = schedule.byte()
        self._ways = _WAYS[ways & 7]
        # Of decode's pages, in every fourth schedule, as of a device's; None: they are written on the spot.
        self.write_time = WRITE_TIMES[ways >> 5 & 3] if ways >> 3 & 3 == 3 else None
        sizes, speeds = schedule.byte(), schedule.byte()
        self.decode_block_size = 4
        self.prefill_block_size = (4, 4, 4, 4, 4, 4, 2, 8)[sizes & 7]
        spare = (2, 0, 1, 3)
        self.num_decode_blocks = MAX_MODEL_LEN // 4 + spare[sizes >> 3 & 3]
        self.num_prefill_blocks = (MAX_MODEL_LEN + 4 * spare[sizes >> 5 & 3]) // self.prefill_block_size
        block_bytes = layout_of(self.prefill_block_size).bytes_per_block
        self.frame_bytes = (1 << 20, block_bytes // 2, block_bytes, 2 * block_bytes)[speeds & 3]
        self.prefill_budget = (_WIDE, _WIDE, 3, 8)[speeds >> 2 & 3]
        self.decode_budget = (_WIDE, _WIDE, _WIDE, 3)[sizes >> 6 & 3]
        self.prefill_step_time = _STEP_TIMES[speeds >> 4 & 3]
        self.decode_step_time = _STEP_TIMES[speeds >> 6 & 3]

    # --- time -----------------------------------------------------------------------------------------

    def at(self, time: float, action: Action, *arguments: object) -> None:
        """Do something then; in order where times are equal."""
        self._num_scheduled += 1
        heappush(self._events, (time, self._num_scheduled, action, arguments))

    def after(self, delay: float, action: Action, *arguments: object) -> None:
        """Do something later."""
        self._num_scheduled += 1
        heappush(self._events, (self.now + delay, self._num_scheduled, action, arguments))

    def run(self) -> None:
        """Let everything happen. Raises Violation, or whatever production code raised."""
        events, num_events, next_poke = self._events, 0, 0
        while True:
            if num_events >= next_poke or not events:
                next_poke = self._poke(num_events)
                if not events:
                    break
            time, _, action, arguments = heappop(events)
            assert time >= self.now, f"from {self.now} back to {time}"
            self.now = time
            action(*arguments)
            if self.decode.reservations:
                self.decode.check()
            num_events += 1
        self._check_end()
        self.count["events"] += num_events

    def log(self, line: str) -> None:
        """Add to the trace."""
        if self._trace is not None:
            self._trace.append(f"{self.now:10.4f}  {line}")

    def fault(self, fault: Fault, name: str, kind: str) -> None:
        """Something goes wrong with a message."""
        self.count["message " + fault.value] += 1
        self.log(f"fault: {kind} frame of {name} is {fault.value}")

    def _poke(self, num_events: int) -> int:
        """Begin what is due from outside; returns after how many events to look again."""
        starts, chaos = self._starts, self._chaos
        while starts and (starts[0][0] <= num_events or not self._events):
            self.start(starts.pop(0)[1])
        while chaos and chaos[0][0] <= num_events:
            self._befall(*chaos.pop(0)[1:])
        if num_events > MAX_EVENTS:
            raise Violation("it never comes to rest")
        return min((due[0][0] for due in (starts, chaos) if due), default=MAX_EVENTS + 1)

    def start(self, case: Case, *, tries_again: bool = True) -> None:
        """A client asks."""
        flight = Flight(self, f"r{len(self.flights)}", case, tries_again)
        self.flights.append(flight)
        flight.begin()

    def _check_end(self) -> None:
        for flight in self.flights:
            if flight.ending is None:
                raise Violation(f"{flight.name} never ended")
        self.decode.check_idle()
        self.prefill.check_idle()
        if self.router.attempts or self.calls:
            raise Violation("an attempt or a call never ended")
        for engine in (self.decode.engine, self.prefill.engine):
            self.count["preemption"] += engine.scheduler.num_preemptions
        for outcome, times in self.decode.stats.outcomes.items():
            self.count["outcome: " + outcome] += times

    # --- what goes between workers and router -----------------------------------------------------------

    def send_tokens(self, sessions: SessionHost, events: Sequence[TokenEvent]) -> None:
        """Tell the router of sampled tokens, each of which must be the one that the oracle gives."""
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            self._check_token(event)
            by_request.setdefault(event.request_id, []).append(event)
        for request_id, its in by_request.items():
            attempt = self.router.attempts.get(request_id)
            if attempt is not None:
                sessions.send(request_id, attempt.flight.take_tokens, attempt, its)

    def send_failure(self, sessions: SessionHost, request_id: str, reason: FailureReason) -> None:
        """Tell the router that a worker gives up."""
        attempt = self.router.attempts.get(request_id)
        if attempt is not None:
            sessions.send(request_id, attempt.flight.take_error, attempt, reason.value)

    def arrive_beside(self, message: PagesMessage, is_corrupted: bool) -> None:
        """A message of a side path reaches decode, whichever incarnation that is now."""
        self.decode.side_arrived(message, is_corrupted)

    def pick_way(self) -> Way:
        """How a transfer's pages travel."""
        return self._ways[self.schedule.byte() % len(self._ways)] if len(self._ways) > 1 else self._ways[0]

    def echo(self, call: PushCall) -> None:
        """All frames of a call come once more, as a call of its own."""
        PushCall(self, None, f"echo of {call.name}").replay(list(call.sent))

    def _check_token(self, event: TokenEvent) -> None:
        flight = self.flights[int(event.request_id[1:].split("/")[0])]
        choice = flight.choices_of[event.request_id][event.choice]
        tokens, reason = flight.case.outcomes[choice]
        is_last = event.position == len(tokens) - 1
        if event.position >= len(tokens) or event.token.token_id != tokens[event.position]:
            raise Violation(f"{event.request_id} gets a wrong token {event.position} of choice {choice}")
        if event.finish_reason is not (reason if is_last else None):
            raise Violation(f"{event.request_id}, choice {choice} ends with {event.finish_reason}")

    # --- chaos ------------------------------------------------------------------------------------------

    def _befall(self, what: Chaos, number: int) -> None:
        self.count["chaos: " + what.value] += 1
        if what is not Chaos.NOTHING:
            self.log(f"chaos: {what.value} ({number})")
        flight = self.flights[number % len(self.flights)]
        match what:
            case Chaos.ABORT:
                flight.abort()
            case Chaos.ABORT_CHOICE:
                flight.abort_choice(number % len(flight.outputs))
            case Chaos.RESTART_DECODE:
                self._restart_decode(number)
            case Chaos.RESTART_PREFILL:
                self._restart_prefill(number)
            case Chaos.CUT_DECODE_SESSION if self.router.decode is not None:
                self.router.decode.cut(NOTICES[number & 3], NOTICES[number >> 2 & 3])
            case Chaos.CUT_PREFILL_SESSION if self.router.prefill is not None:
                self.router.prefill.cut(NOTICES[number & 3], NOTICES[number >> 2 & 3])
            case Chaos.CUT_CALL if self.calls:
                self.calls[number % len(self.calls)].cut(number)
            case Chaos.PAUSE_WRITER if self.prefill.pushes:
                self.prefill.pushes[-1].pause((*STALLS, *LONG_STALLS)[number & 7])
            case Chaos.LAG_RECEIVER:
                self.receiver_lag = STALLS[number & 3] + 2
            case Chaos.FAIL_PREFILL_STEP:
                self.prefill.engine.fails_next_step = True
            case Chaos.FAIL_DECODE_STEP:
                self.decode.engine.fails_next_step = True
            case Chaos.ECHO if self.calls:
                self.after(STALLS[number & 3] * 0.01, self.echo, self.calls[number % len(self.calls)])

    def _restart_decode(self, number: int) -> None:
        self.decode.die()
        self._epoch += 1
        self.decode = VirtualDecode(self, self._epoch)
        for call in list(self.calls):
            call.lose_server(number)
            if number & 4:
                # When the router has found the new one, and has asked it for pages.
                self.after(NOTICES[number & 3] + RECONNECT_DELAY_S + 0.003, self.echo, call)
        if self.router.decode is not None:
            self.router.decode.cut(0.0, NOTICES[number & 3])

    def _restart_prefill(self, number: int) -> None:
        self.prefill.die(number)
        self.prefill = VirtualPrefill(self)
        if self.router.prefill is not None:
            self.router.prefill.cut(0.0, NOTICES[number & 3])
