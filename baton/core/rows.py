"""What one sequence may compute in the next step, and its row in that step's plan.

While a step is under way, the next one is planned. A sequence whose next token is being sampled can take part
all the same: its row `follows` the one that samples it, and the runner puts the token in. Whether that token
ends the sequence is known only when it is; if it does, the row was computed in vain.
"""

from baton.core.plan import PromptTask, SampleTask, ScheduledRow
from baton.core.request import SequenceState
from baton.core.sampling import SamplingParams, choice_seed
from baton.core.stopping import ends_by_length


def num_ready_tokens(sequence: SequenceState, max_model_len: int) -> int:
    """Tokens that the next step may compute; 0: the sequence has to wait for a step under way."""
    if sequence.num_awaited_tokens and not _may_follow(sequence, max_model_len):
        return 0
    return sequence.num_tokens + sequence.num_awaited_tokens - sequence.num_planned_tokens


def _may_follow(sequence: SequenceState, max_model_len: int) -> bool:
    """Whether the sequence can go on from a token that is not known yet."""
    params = sequence.request.sampling
    reads_tokens = _reads_output(params)
    if sequence.hands_over or reads_tokens:
        return False
    if not sequence.output_token_ids and params.n > 1:
        return False  # choices fork from the prompt as it is
    num_awaited = sequence.num_awaited_tokens
    num_output = len(sequence.output_token_ids) + num_awaited
    return not ends_by_length(params, num_output, sequence.num_tokens + num_awaited, max_model_len)


def _reads_output(params: SamplingParams) -> bool:
    """Whether the host has to know the output before it can choose a token."""
    return params.has_penalties or bool(params.grammar or params.bad_words or params.logits_rules)


def row_of(sequence: SequenceState, count: int, follows: int | None) -> ScheduledRow:
    """The sequence's next `count` tokens. `follows`: see ScheduledRow."""
    start = sequence.num_planned_tokens
    num_tokens = sequence.num_tokens + sequence.num_awaited_tokens
    samples: tuple[SampleTask, ...] = ()
    if start + count == num_tokens:
        samples = tuple(_sample_task(sequence, choice, num_tokens) for choice in choices_to_sample(sequence))
    token_ids = sequence.tokens(start, start + count) if follows is None else (0,)
    return ScheduledRow(
        token_ids, start, sequence.block_table, samples, follows, _prompt_task(sequence, start, count)
    )


def asks_for_prompt(sequence: SequenceState) -> bool:
    """Whether the log probabilities of its prompt are still to be told: all of it has to be computed then."""
    return sequence.request.sampling.num_prompt_logprobs is not None and not sequence.output_token_ids


def _prompt_task(sequence: SequenceState, start: int, count: int) -> PromptTask | None:
    num_logprobs = sequence.request.sampling.num_prompt_logprobs
    if num_logprobs is None or not asks_for_prompt(sequence):
        return None
    following = sequence.request.prompt_token_ids[start + 1 : start + count + 1]
    return PromptTask(following, num_logprobs) if following else None


def choices_to_sample(sequence: SequenceState) -> tuple[int, ...]:
    """A prompt's last row samples the first token of all its choices; after that each goes alone."""
    if sequence.output_token_ids:
        return (sequence.choice,)
    choices = range(sequence.request.sampling.n)
    return tuple(choice for choice in choices if choice not in sequence.dropped_choices)


def _sample_task(sequence: SequenceState, choice: int, position: int) -> SampleTask:
    params = sequence.request.sampling
    return SampleTask(
        params=params,
        seed=sequence.seed if choice == sequence.choice else choice_seed(params.seed, choice),
        position=position,
        prompt_token_ids=sequence.request.prompt_for_sampler,
        output_token_ids=sequence.output_token_ids,
        matcher=sequence.matcher,
        rules=sequence.request.rules,
    )
