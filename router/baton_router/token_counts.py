"""Tokens of texts and texts of tokens for clients that only want to know; the same for HTTP and gRPC."""

from collections.abc import Sequence

from baton.core.errors import InvalidRequest
from baton_router.request_checks import check_token_ids
from baton_router.served_model import ServedModel
from baton_router.truncation import Truncation


async def tokens_of(
    served: ServedModel,
    text: str,
    *,
    add_special_tokens: bool,
    name: str,
    truncation: Truncation | None = None,
) -> list[int]:
    """Token ids of a text that came in the field `name`. Raises InvalidRequest for too many."""
    limit = served.max_counted_tokens
    tokens = await served.tokenizer.encode(text, max_tokens=limit, add_special_tokens=add_special_tokens)
    _require_few(name, len(tokens), limit)
    if truncation is None:
        return tokens
    most = served.backend.max_model_len if truncation.num_tokens == -1 else limit
    return list(truncation.kept(tokens, most))


async def text_of(served: ServedModel, token_ids: Sequence[int], *, name: str) -> str:
    """Text of the token ids in the field `name`, special tokens included.

    Raises InvalidRequest for too many, and for ids that the model has not.
    """
    _require_few(name, len(token_ids), served.max_counted_tokens)
    check_token_ids(name, token_ids, served.vocab_size)
    return await served.tokenizer.decode_many(token_ids)


def _require_few(name: str, num_tokens: int, limit: int) -> None:
    if num_tokens > limit:
        raise InvalidRequest(
            f"{name} has {num_tokens} tokens, and at most {limit} are taken.", param=name, code="out_of_range"
        )
