"""The workers that one router knows, connected or not."""

import asyncio
import secrets
from collections.abc import Callable

from baton.config import RouterConfig
from baton.core.errors import InvalidRequest, Unavailable
from baton.core.logits_rules import FIELD as RULES
from baton.v1 import worker_pb2
from baton_router.workers.one_model import OneModel
from baton_router.workers.policy import WorkerView, place
from baton_router.workers.worker_link import WorkerLink


class WorkerPool:
    """A link to every worker of the configuration."""

    def __init__(self, config: RouterConfig, config_digest: bytes) -> None:
        self.model = OneModel(config_digest)
        router_id = f"router-{secrets.token_hex(4)}"

        def links(addresses: tuple[str, ...], role: worker_pb2.Role) -> list[WorkerLink]:
            return [
                WorkerLink(address, role, router_id, config.cluster_token, self.model)
                for address in addresses
            ]

        prefills = links(config.prefill_addresses, worker_pb2.ROLE_PREFILL)
        decodes = links(config.decode_addresses, worker_pb2.ROLE_DECODE)
        workers = links(config.worker_addresses, worker_pb2.ROLE_BOTH)
        self.links = [*prefills, *decodes, *workers]
        self.prefills = [*prefills, *workers]
        self.decodes = [*decodes, *workers]
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether a request could be placed now."""
        return place(_views(self.prefills), _views(self.decodes)) is not None

    @property
    def capacity(self) -> int:
        """Sequences that the decode servers run at once; 0 where no request could be placed.

        Of a server that takes nothing new, those that it still has, which keep their places until they end.
        """
        if not self.is_ready:
            return 0
        num_ending = sum(
            link.worker.num_in_flight for link in self.decodes if link.worker is not None and link.is_draining
        )
        return sum(view.max_num_seqs for view in _views(self.decodes)) + num_ending

    @property
    def max_model_len(self) -> int | None:
        """Tokens of a request that every connected worker takes; None while there is none."""
        return min((view.max_model_len for view in _views(self.links)), default=None)

    def place(self, needed: frozenset[str]) -> tuple[WorkerLink, WorkerLink]:
        """The prefill and decode server for the next request; the same twice where nothing is to travel.

        `needed`: features that both have to know. Raises Unavailable if there are none.
        """
        placement = place(_views(self.prefills, needed), _views(self.decodes, needed))
        if placement is None:
            self._require_rules(needed)
            raise Unavailable(self._what_is_missing(needed))
        decode = self.decodes[placement.decode]
        return decode if placement.prefill is None else self.prefills[placement.prefill], decode

    def reset_prefix_caches(self) -> None:
        """Ask all that are connected."""
        for link in self.links:
            if link.worker is not None:
                link.send(worker_pb2.Command(reset_prefix_cache=worker_pb2.ResetPrefixCache()))

    async def run(self, on_change: Callable[[], None]) -> None:
        """Keep sessions with all workers; `on_change` is called after one came, went or began to drain."""
        async with asyncio.TaskGroup() as tasks:
            for link in self.links:
                tasks.create_task(link.run(self._changed))
            while True:
                await self._changed.wait()
                self._changed.clear()
                on_change()

    def _require_rules(self, needed: frozenset[str]) -> None:
        """Raises InvalidRequest for a logits rule that a worker lacks; which it has is its owner's to say."""
        lacking = {name for view in _views(self.links) for name in needed - view.features}
        for name in sorted(name for name in lacking if name.startswith(f"{RULES}.")):
            raise InvalidRequest(
                f"No workers have the logits rule '{name.removeprefix(f'{RULES}.')}': see their option "
                "--logits-rule.",
                param=name,
            )

    def _what_is_missing(self, needed: frozenset[str]) -> str:
        if self.is_ready:
            unknown = {name for view in _views(self.links) for name in needed - view.features}
            return f"Workers of an older version don't know {', '.join(sorted(unknown))}. Leave it out."
        if all(link.role == worker_pb2.ROLE_BOTH for link in self.links):
            return "No worker is connected. Try again later."
        for role, links in (("prefill", self.prefills), ("decode", self.decodes)):
            if not _views(links):
                return f"No {role} server is connected. Try again later."
        return "No prefill server is connected whose KV pages a decode server can take."


def _views(links: list[WorkerLink], needed: frozenset[str] = frozenset()) -> list[WorkerView]:
    views = [view for index, link in enumerate(links) if (view := link.view(index)) is not None]
    return [view for view in views if needed <= view.features]
