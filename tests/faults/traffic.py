"""Requests as clients send them, and what may become of them: the right answer, or an error that says so."""

import itertools
import random
import threading
from dataclasses import dataclass, field

import openai
import pytest

from tests.faults.cluster import FaultyCluster

# No request may take longer, whatever breaks.
ANSWER_DEADLINE_S = 20.0
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Prompt:
    """What is asked, always greedily."""

    num_tokens: int
    max_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """The prompt: always the same tokens for the same length."""
        ids = random.Random(self.num_tokens)
        return [ids.randrange(4, 4096) for _ in range(self.num_tokens)]


@dataclass
class Answer:
    """Tokens, with the logarithm of each one's probability: KV that is wrong shows there first."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: openai.APIError | None = None

    def add(self, choice: openai.types.CompletionChoice) -> None:
        """Append what a chunk or a whole answer holds."""
        assert choice.model_extra is not None
        self.token_ids += choice.model_extra["token_ids"]
        if choice.logprobs is not None:
            self.logprobs += [value for value in choice.logprobs.token_logprobs or () if value is not None]


class Request:
    """A request under way, on a thread of its own."""

    def __init__(
        self, client: openai.OpenAI, prompt: Prompt, salt: str, expected: Answer | None, *, stream: bool
    ) -> None:
        self.prompt = prompt
        self.salt = salt
        self.answer = Answer()
        self._client = client
        self._stream = stream
        self._expected = expected
        self._decodes = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_decoding(self) -> None:
        """Wait until the decode server's tokens come: the transfer is over. Only for streams."""
        assert self._decodes.wait(ANSWER_DEADLINE_S)

    @property
    def is_over(self) -> bool:
        """Whether the client has its answer."""
        return not self._thread.is_alive()

    def result(self) -> Answer:
        """The answer; fails the test where it does not come, or is no proper error."""
        self._thread.join(ANSWER_DEADLINE_S)
        assert self.is_over, f"no answer within {ANSWER_DEADLINE_S} s"
        if self._failure is not None:
            raise self._failure
        if self.answer.error is not None:
            _require_clean(self.answer.error)
        return self.answer

    def require_right(self) -> None:
        """The answer is what it is without faults."""
        assert self.result().error is None, self.answer.error
        self._require_expected(self._expected)

    def require_right_or_clean(self) -> None:
        """The answer is right, or an error, after nothing but right tokens."""
        if self.result().error is None:
            self._require_expected(self._expected)
        else:
            assert self._expected is not None
            count = len(self.answer.token_ids)
            self._require_expected(Answer(self._expected.token_ids[:count], self._expected.logprobs[:count]))

    def _require_expected(self, expected: Answer | None) -> None:
        assert expected is not None
        assert self.answer.token_ids == expected.token_ids
        assert self.answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)

    def _run(self) -> None:
        try:
            self._ask()
        except openai.APITimeoutError as error:
            self._failure = error
        except openai.APIError as error:
            self.answer.error = error
        except BaseException as error:
            self._failure = error

    def _ask(self) -> None:
        answer = self._client.completions.create(
            model="demo",
            prompt=self.prompt.token_ids,
            max_tokens=self.prompt.max_tokens,
            temperature=0,
            logprobs=0,
            stream=self._stream,
            extra_body={"ignore_eos": True, "return_token_ids": True, "cache_salt": self.salt},
        )
        for chunk in answer if isinstance(answer, openai.Stream) else [answer]:
            self.answer.add(chunk.choices[0])
            if len(self.answer.token_ids) > 1:
                self._decodes.set()


class Traffic:
    """Sends requests to a cluster, and knows the right answers."""

    def __init__(self, cluster: FaultyCluster) -> None:
        self._client = openai.OpenAI(
            base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_DEADLINE_S
        )
        self._expected: dict[Prompt, Answer] = {}
        self._salts = map(str, itertools.count())

    def learn(self, *prompts: Prompt) -> None:
        """Ask each once, while nothing is broken."""
        for prompt in prompts:
            answer = self.start(prompt).result()
            assert len(answer.token_ids) == len(answer.logprobs) == prompt.max_tokens
            self._expected[prompt] = answer

    def start(self, prompt: Prompt, salt: str | None = None, *, stream: bool = False) -> Request:
        """Ask; without a salt that was used before no page is found in a cache, and all have to travel."""
        expected = self._expected.get(prompt)
        return Request(self._client, prompt, salt or next(self._salts), expected, stream=stream)


def _require_clean(error: openai.APIError) -> None:
    """An error of OpenAI's shape that says that trying again may help; 503 unless tokens came before it."""
    assert isinstance(error.body, dict), (error, error.__cause__)
    assert error.body["message"]
    assert error.body["type"] == "server_error"
    assert error.body["code"] in ("unavailable", "overloaded"), error.body
    if isinstance(error, openai.APIStatusError):
        assert error.status_code == 503
        assert int(error.response.headers["retry-after"]) > 0
