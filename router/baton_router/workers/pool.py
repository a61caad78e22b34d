"""The workers that one router knows, connected or not."""

import asyncio
import logging
import secrets
from collections.abc import Callable

from baton.config import RouterConfig
from baton.core.errors import InvalidRequest, Unavailable
from baton.core.logits_rules import FIELD as RULES
from baton.v1 import worker_pb2
from baton.worker_sources import is_looked_at
from baton_router.workers.discovery import LOOK_AGAIN_S, LookupFailed, addresses_in
from baton_router.workers.one_model import OneModel
from baton_router.workers.policy import WorkerView, place
from baton_router.workers.worker_link import WorkerLink

logger = logging.getLogger(__name__)

_NOUNS = {
    worker_pb2.ROLE_PREFILL: "prefill server",
    worker_pb2.ROLE_DECODE: "decode server",
    worker_pb2.ROLE_BOTH: "worker of both roles",
}


class WorkerPool:
    """A link to every worker of the configuration."""

    def __init__(self, config: RouterConfig, config_digest: bytes) -> None:
        self.model = OneModel(config_digest)
        self._router_id = f"router-{secrets.token_hex(4)}"
        self._cluster_token = config.cluster_token
        self._sources = [
            *((source, worker_pb2.ROLE_PREFILL) for source in config.prefill_addresses),
            *((source, worker_pb2.ROLE_DECODE) for source in config.decode_addresses),
            *((source, worker_pb2.ROLE_BOTH) for source in config.worker_addresses),
        ]
        self.links: list[WorkerLink] = []
        self.prefills: list[WorkerLink] = []  # of them, those that compute prompts
        self.decodes: list[WorkerLink] = []  # and those that continue them
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        for source, role in self._sources:
            if not is_looked_at(source):
                self._add(source, role)

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
                self._tasks[link] = tasks.create_task(link.run(self._changed))
            for source, role in self._sources:
                if is_looked_at(source):
                    tasks.create_task(self._look_at(source, role, tasks))
            while True:
                await self._changed.wait()
                self._changed.clear()
                on_change()

    def _add(self, address: str, role: worker_pb2.Role) -> WorkerLink:
        link = WorkerLink(address, role, self._router_id, self._cluster_token, self.model)
        for links in self._lists_of(role):
            links.append(link)
        return link

    def _lists_of(self, role: worker_pb2.Role) -> list[list[WorkerLink]]:
        lists = [self.links]
        lists += [self.prefills] if role != worker_pb2.ROLE_DECODE else []
        return lists + ([self.decodes] if role != worker_pb2.ROLE_PREFILL else [])

    async def _look_at(self, source: str, role: worker_pb2.Role, tasks: asyncio.TaskGroup) -> None:
        """Keep a link to every worker that a source names, for ever."""
        links: dict[str, WorkerLink] = {}
        complaint = ""
        while True:
            try:
                addresses = await addresses_in(source)
                complaint = ""
            except LookupFailed as error:
                if str(error) != complaint:
                    logger.warning("no %s by %s: %s", _NOUNS[role], source, error)
                complaint, addresses = str(error), tuple(links)
            for address in addresses:
                if address not in links and not any(link.address == address for link in self.links):
                    links[address] = link = self._add(address, role)
                    self._tasks[link] = tasks.create_task(link.run(self._changed))
            for address in [address for address in links if address not in addresses]:
                if links[address].worker is None:  # while there is a session, that says that it lives
                    self._forget(links.pop(address))
            await asyncio.sleep(LOOK_AGAIN_S)

    def _forget(self, link: WorkerLink) -> None:
        logger.info("the %s at %s is no longer named", link.noun, link.address)
        for links in self._lists_of(link.role):
            links.remove(link)
        self._tasks.pop(link).cancel()
        self._changed.set()

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
