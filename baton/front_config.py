"""Settings of the router's front doors: see baton/config.py, whose RouterConfig has them."""

import json
from dataclasses import dataclass
from typing import Any

from baton.core.errors import StartupError
from baton.core.sampling import MAX_LOGPROBS
from baton.option import check_options, option
from baton.option_values import JSON_OBJECT, JSON_STRINGS, between

_ANY = ("*",)


@dataclass(frozen=True)
class FrontConfig:
    """What clients are allowed, and what they get that leave it out; StartupError where it makes no sense."""

    generation_config: str = option(
        "--generation-config",
        "auto",
        "Where sampling's defaults come from: auto, the model's generation_config.json; baton or vllm, none; "
        "or a folder with such a file.",
    )
    override_generation_config: str = option(
        "--override-generation-config",
        "{}",
        'Sampling\'s defaults in place of those, such as {"temperature": 0.5}.',
        JSON_OBJECT,
    )
    max_logprobs: int = option(
        "--max-logprobs", 20, "Most logprobs of a token that a request may ask for.", between(0, MAX_LOGPROBS)
    )
    trust_request_chat_template: bool = option(
        "--trust-request-chat-template",
        False,
        "Take chat templates from requests: programs, in a sandbox, that can take all of the router's time.",
    )
    allowed_origins: tuple[str, ...] = option(
        "--allowed-origins",
        (),
        'Origins whose web pages may ask the HTTP API, as a JSON list; ["*"] for all.',
        JSON_STRINGS,
        unset="none",
    )
    allowed_methods: tuple[str, ...] = option(
        "--allowed-methods", _ANY, "HTTP methods that these pages may use, as a JSON list.", JSON_STRINGS
    )
    allowed_headers: tuple[str, ...] = option(
        "--allowed-headers", _ANY, "Headers that these pages may send, as a JSON list.", JSON_STRINGS
    )
    allow_credentials: bool = option(
        "--allow-credentials", False, "These pages may send cookies and authorization."
    )
    root_path: str = option("--root-path", "", "Path that a proxy serves the HTTP API under, such as /llm.")
    enable_tokenizer_info_endpoint: bool = option(
        "--enable-tokenizer-info-endpoint",
        False,
        "Serve /tokenizer_info: the tokenizer's config and template.",
    )
    enable_server_info: bool = option(
        "--enable-server-info", False, "Serve /server_info: the router's options."
    )

    enable_dev_endpoints: bool = option(
        "--enable-dev-endpoints",
        False,
        "Serve POST /reset_prefix_cache, by which anybody makes the workers compute everything anew.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise StartupError(f"root-path must begin with / and not end with one, but is '{self.root_path}'")

    @property
    def overrides(self) -> dict[str, Any]:
        """Sampling's defaults that win over the model's."""
        overrides: dict[str, Any] = json.loads(self.override_generation_config)
        return overrides
