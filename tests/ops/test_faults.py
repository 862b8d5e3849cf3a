"""What the table of faults calls well, lost and proven: each of its lines can fail."""

from benchmarks.faults.__main__ import row
from benchmarks.faults.collector import COLLECTORS, DASHBOARDS, SETTLED_SECONDS, Event, Outcome, well

CLIENTS = [("cycles", k) for k in range(COLLECTORS)] + [("predict", k) for k in range(DASHBOARDS)]
ENDED = 100.0
LATER = ENDED + SETTLED_SECONDS + 10


def answered(when: float) -> list[Event]:
    """Return one response per client."""
    return [Event(when, call, client, "200") for call, client in CLIENTS]


def test_well_is_when_everybody_was_answered() -> None:
    """Seconds from the fault's end to the first answer of the client that waited longest."""
    events = [*answered(ENDED - 1), *answered(ENDED + 0.5), *answered(ENDED + 3)]
    assert 0.5 == well(events, ENDED, LATER)
    slow = [event for event in events if (event.call, event.client) != CLIENTS[-1] or event.when != ENDED + 0.5]
    assert 3.0 == well(slow, ENDED, LATER)


def test_one_client_that_hangs_is_not_well() -> None:
    """A fault is not recovered while one client gets no response, even if others of its kind do."""
    for forgotten in CLIENTS:
        events = [one for one in answered(ENDED + 1) if (one.call, one.client) != forgotten]
        assert well(events, ENDED, LATER) is None


def test_recovery_begins_after_the_last_failure() -> None:
    """Recovery needs responses for some time after the last failure."""
    failure = Event(ENDED + 4, "cycles", 0, "503")
    events = [*answered(ENDED + 1), failure, *answered(ENDED + 5)]
    assert 5.0 == well(events, ENDED, LATER)
    assert well(events, ENDED, failure.when + SETTLED_SECONDS / 2) is None
    assert well([*answered(ENDED + 1), failure], ENDED, LATER) is None


def test_every_kind_of_failure_breaks_the_promise() -> None:
    """A lost flight, no recovery, no acknowledged row, or a fault without effect each fail the promise."""
    good = Outcome("no failure", 10, 0, 0.1)
    assert good.passed()
    for bad in ({"lost": 1}, {"well": None}, {"acknowledged": 0}, {"proven": False}):
        assert not good._replace(**bad).passed()
    assert "**never**" in row("a fault", good._replace(well=None))
    assert "**not as it should be**" in row("a fault", good._replace(proven=False))
