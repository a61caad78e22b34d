"""The simulator finds bugs that are put into production code on purpose."""

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.search import first_failure

SEED = 2
NUM_SCHEDULES = 1500  # the subtlest takes a third of them


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_bug_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.put_in(monkeypatch)
    assert first_failure(SEED, NUM_SCHEDULES) is not None


def test_there_is_nothing_to_find_without_a_bug() -> None:
    assert first_failure(SEED, 200) is None
