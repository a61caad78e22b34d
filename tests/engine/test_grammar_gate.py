"""Requests wait for their grammar, in order, and leave when they are aborted."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from baton.core.commands import (
    AbortRequest,
    AddRequest,
    CommitRequest,
    EngineCommand,
    FailureReason,
    RequestFailure,
    ReserveBlocks,
)
from baton.core.errors import InvalidRequest
from baton.core.fields import FormatText
from baton.core.grammar import Grammar
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.engine.grammar_gate import GrammarGate
from tests.core.grammars import Allowing

TIMEOUT_S = 20.0


class SlowGrammars:
    """Implements `core.ports.Grammars`: compiles when `may_compile` is set."""

    def __init__(self) -> None:
        self.may_compile = threading.Event()
        self.made: dict[str, Grammar] = {}

    def known(self, text: str) -> Grammar | None:
        return self.made.get(text)

    def compile(self, text: str) -> Grammar:
        assert self.may_compile.wait(TIMEOUT_S)
        if text == "wrong":
            raise InvalidRequest("It is wrong.")
        if text == "bug":
            raise ZeroDivisionError
        self.made[text] = Allowing({1})
        return self.made[text]


class Engine:
    """What the gate has passed on, and what it said of requests."""

    def __init__(self) -> None:
        self.grammars = SlowGrammars()
        self.commands: list[EngineCommand] = []
        self.failures: list[RequestFailure] = []
        self.gate = GrammarGate(self.grammars, self.commands.append, self.failures.append)

    async def settled(self) -> None:
        """Nothing compiles any more."""
        self.grammars.may_compile.set()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*self.gate._tasks)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    yield made
    await made.settled()


def request(request_id: str, grammar: str = "") -> EngineRequest:
    return EngineRequest(request_id, (1,), b"", (), SamplingParams(grammar=FormatText(grammar)))


async def test_a_request_without_a_grammar_passes_one_that_waits(engine: Engine) -> None:
    engine.gate.submit(ReserveBlocks(request("waits", "slow")))
    engine.gate.submit(AddRequest(request("plain")))
    assert engine.commands == [AddRequest(request("plain"))]
    await engine.settled()
    [_, passed] = engine.commands
    assert isinstance(passed, ReserveBlocks)
    assert passed == ReserveBlocks(request("waits", "slow"))
    assert passed.request.grammar is engine.grammars.made["slow"]


async def test_a_known_grammar_costs_no_time(engine: Engine) -> None:
    engine.grammars.made["known"] = Allowing({1})
    engine.gate.submit(AddRequest(request("id", "known"), hands_over=True, export_from=3))
    assert engine.commands == [AddRequest(request("id", "known"), hands_over=True, export_from=3)]


async def test_an_aborted_request_never_reaches_the_engine(engine: Engine) -> None:
    engine.gate.submit(AddRequest(request("gone", "slow")))
    engine.gate.submit(AbortRequest("gone"))
    engine.gate.submit(AbortRequest("other"))
    engine.gate.submit(AddRequest(request("gone", "slow too")))  # a new one under its name
    await engine.settled()
    assert engine.commands == [AbortRequest("other"), AddRequest(request("gone", "slow too"))]
    assert engine.failures == []


async def test_a_choice_that_is_aborted_meanwhile_is_aborted(engine: Engine) -> None:
    engine.gate.submit(AddRequest(request("id", "slow")))
    engine.gate.submit(AbortRequest("id", 1))
    assert engine.commands == []
    await engine.settled()
    engine.gate.submit(CommitRequest("id", {0: 1}))
    assert engine.commands == [
        AddRequest(request("id", "slow")),
        AbortRequest("id", 1),
        CommitRequest("id", {0: 1}),
    ]


@pytest.mark.parametrize(
    ("grammar", "reason"), [("wrong", FailureReason.INVALID), ("bug", FailureReason.INTERNAL)]
)
async def test_a_grammar_that_cant_be_had_costs_its_request_alone(
    engine: Engine, grammar: str, reason: FailureReason
) -> None:
    engine.gate.submit(AddRequest(request("id", grammar)))
    engine.gate.submit(AddRequest(request("other", "fine")))
    await engine.settled()
    assert engine.commands == [AddRequest(request("other", "fine"))]
    assert [(failure.request_id, failure.reason) for failure in engine.failures] == [("id", reason)]
    engine.gate.submit(AbortRequest("id"))
    assert engine.commands[1:] == [AbortRequest("id")]


async def test_closed_it_passes_nothing_on(engine: Engine) -> None:
    engine.gate.submit(AddRequest(request("id", "slow")))
    engine.gate.close()
    engine.grammars.may_compile.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*engine.gate._tasks, return_exceptions=True)
    assert engine.commands == []
