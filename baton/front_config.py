"""Settings of the router's front doors: see baton/config.py, whose RouterConfig has them."""

from dataclasses import dataclass

from baton.option import check_options, option


@dataclass(frozen=True)
class FrontConfig:
    """What clients are allowed, and what they get that leave it out; StartupError where it makes no sense."""

    trust_request_chat_template: bool = option(
        "--trust-request-chat-template",
        False,
        "Take chat templates from requests: programs, in a sandbox, that can take all of the router's time.",
    )

    def __post_init__(self) -> None:
        check_options(self)
