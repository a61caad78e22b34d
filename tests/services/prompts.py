"""Prompts for the services' tests."""


def prompt_of(length: int, salt: int = 0) -> tuple[int, ...]:
    """Token ids; prompts of different salts share no prefix."""
    return tuple((7 * index + 31 * salt + 5) % 1000 for index in range(length))
