"""What requests are called: by clients, in the log and among the workers."""

import secrets
import uuid

from baton.core.errors import InvalidRequest

MAX_LENGTH = 128


def chosen_id(**given: str | None) -> str:
    """The first that a client gave, by the names of where it stood, or a new one. Raises InvalidRequest."""
    for name, request_id in given.items():
        if request_id:
            if is_id(request_id):
                return request_id
            raise InvalidRequest(
                f"{name} has at most {MAX_LENGTH} characters, all of them printable ASCII.", param=name
            )
    return uuid.uuid4().hex


def is_id(request_id: str) -> bool:
    """Whether a header and a line of the log can hold it."""
    return len(request_id) <= MAX_LENGTH and request_id.isascii() and request_id.isprintable()


def unique_id(answer_id: str, index: int) -> str:
    """What one prompt is called inside; clients' ids need not differ, and these do."""
    return f"{answer_id}-{index}-{secrets.token_hex(8)}"
