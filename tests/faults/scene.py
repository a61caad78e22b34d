"""The same requests around every fault, and what has to hold after it."""

from tests.e2e.processes import wait_until
from tests.faults.cluster import TRANSFER_DEADLINE_S, FaultyCluster
from tests.faults.proxy import Aim, Fault, Strike
from tests.faults.traffic import Prompt, Request, Traffic

# 2 KiB of KV a token: the victim's pages are about 2 MB, in 16 messages.
VICTIM = Prompt(num_tokens=1000, max_tokens=8)  # its transfer is hit
NEIGHBOUR = Prompt(num_tokens=100, max_tokens=8)  # its transfer shares the connection
BYSTANDER = Prompt(num_tokens=20, max_tokens=500)  # decodes before, while and after it happens
MID_TRANSFER_BYTES = 1_000_000

STRUCK_WITHIN_S = 10.0
# The longest that either server waits for the other, and a moment for the metrics to tell.
GIVEN_UP_WITHIN_S = TRANSFER_DEADLINE_S + 2.0
# A transfer whose writer can't be heard keeps its pages for that long once more.
PAGES_BACK_WITHIN_S = TRANSFER_DEADLINE_S + 2.0


class Scene:
    """One fault, the three requests that live through it, and the cluster after it."""

    def __init__(self, cluster: FaultyCluster, traffic: Traffic) -> None:
        self.cluster = cluster
        self.fault: Fault
        self.victim: Request
        self.neighbour: Request
        self.bystander: Request
        self._traffic = traffic
        self._outcomes_before = {role: cluster.outcomes(role) for role in ("prefill", "decode")}

    def strike(
        self, strike: Strike, aim: Aim, *, stream: bool = False, on_new_connection: bool = False
    ) -> None:
        """Bring the requests on their way and return as the fault happens."""
        self.bystander = self._traffic.start(BYSTANDER, stream=True)
        self.bystander.wait_decoding()
        if on_new_connection:
            self.cluster.proxy.clear()
        self.fault = self.cluster.proxy.arm(strike, aim)
        self.victim = self._traffic.start(VICTIM, stream=stream)
        self.neighbour = self._traffic.start(NEIGHBOUR)
        self.fault.wait_struck(STRUCK_WITHIN_S)
        assert not self.victim.is_over
        assert not self.bystander.is_over

    def require_right(self) -> None:
        """No client has noticed anything."""
        for request in (self.victim, self.neighbour, self.bystander):
            request.require_right()

    def require_right_or_clean(self) -> None:
        """Every client has a right answer, or has been told that it gets none."""
        for request in (self.victim, self.neighbour, self.bystander):
            request.require_right_or_clean()

    def num_outcomes(self, role: str, outcome: str) -> int:
        """Transfers of a worker that have ended so since the scene began; its process must have lived on."""
        return self.cluster.outcomes(role)[outcome] - self._outcomes_before[role][outcome]

    def wait_outcome(self, role: str, *outcomes: str) -> None:
        """Wait until at least one transfer is counted as one of these."""
        wait_until(
            lambda: any(self.num_outcomes(role, outcome) for outcome in outcomes),
            f"{role} counts {' or '.join(outcomes)}",
            GIVEN_UP_WITHIN_S,
        )

    def wait_idle(self) -> None:
        """Wait until every page is back in both pools."""
        wait_until(self.cluster.is_idle, "every page is back", PAGES_BACK_WITHIN_S)

    def require_service(self) -> None:
        """What failed works when it is tried again, with whatever it has left in caches; so does the new."""
        self._traffic.start(VICTIM, self.victim.salt).require_right()
        self._traffic.start(VICTIM).require_right()
        self.wait_idle()

    def wait_service(self) -> None:
        """As `require_service`, but one more transfer may fail: nobody has used the connection since."""
        self._traffic.start(NEIGHBOUR).require_right_or_clean()
        self.wait_idle()
        self.require_service()
