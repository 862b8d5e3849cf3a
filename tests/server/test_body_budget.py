import mmap
from typing import Any

import numpy as np
import pytest

from service.errors import Overloaded
from service.server.body_budget import MAX_SPARE_BYTES, RETRY_SECONDS, BodyBudget, BodyReservation, Mapping

PAGE = mmap.PAGESIZE


def two(limit: int) -> tuple[BodyBudget, BodyReservation, BodyReservation]:
    """Return a budget and the reservations of two requests."""
    budget = BodyBudget(limit)
    return budget, BodyReservation(budget), BodyReservation(budget)


def test_budget_is_shared_up_to_its_limit() -> None:
    """Requests share the budget; bytes beyond it are rejected, and the rejected request retains its charge."""
    budget, first, second = two(100)
    first.take(60)
    second.take(40)
    for other in (first, second):
        with pytest.raises(Overloaded, match="100 bytes of request bodies are in memory, the limit is 100") as refusal:
            other.take(1)
        assert RETRY_SECONDS == refusal.value.retry_after
    assert (100, 60, 40) == (budget.bytes, first.bytes, second.bytes)


def test_budget_without_other_bodies_has_no_limit() -> None:
    """A request that is alone in the budget is never rejected; while it exceeds the limit, all others are."""
    budget, first, second = two(100)
    first.check(1000)
    first.take(70)
    first.check(1000)
    first.take(1000)
    assert 1070 == budget.bytes
    with pytest.raises(Overloaded):
        second.take(1)


def test_check_charges_no_bytes() -> None:
    """A check charges nothing, and rejects one byte more than the rest of the budget."""
    budget, first, second = two(100)
    first.take(60)
    second.check(40)
    with pytest.raises(Overloaded):
        second.check(41)
    assert (60, 0) == (budget.bytes, second.bytes)


def test_release_returns_all_bytes_once() -> None:
    """A released request charges nothing, and a second release has no effect."""
    budget, first, second = two(100)
    first.take(60)
    second.take(30)
    for _ in range(2):
        first.release()
        assert (30, 0) == (budget.bytes, first.bytes)
    second.take(70)


def test_released_mapping_is_retained_up_to_its_limit() -> None:
    """A mapping of at most 16 MiB is retained, and resized for the next large body."""
    budget, first, second = two(100)
    assert MAX_SPARE_BYTES == len(first.allocate(MAX_SPARE_BYTES))
    mapping = first.mapping
    assert budget.spare is None
    first.release()
    assert (None, mapping) == (first.mapping, budget.spare)
    assert 2 * PAGE == len(second.allocate(2 * PAGE))
    assert (mapping, None) == (second.mapping, budget.spare)


def test_second_released_mapping_replaces_the_first() -> None:
    """Only the last released mapping is retained, and the one before is closed."""
    budget, first, second = two(100)
    first.allocate(PAGE)
    second.allocate(PAGE)
    closed, mapping = first.mapping, second.mapping
    assert closed is not None
    first.release()
    second.release()
    assert mapping is budget.spare
    with pytest.raises(ValueError, match="closed"):
        len(closed)


def test_mapping_in_use_is_not_reused() -> None:
    """A retained mapping that an array still uses is replaced by a new one."""
    budget, first, second = two(100)
    array = np.frombuffer(first.allocate(PAGE), np.uint8)
    mapping = first.mapping
    first.release()
    assert mapping is budget.spare
    assert 3 * PAGE == len(second.allocate(3 * PAGE))
    assert second.mapping is not mapping
    assert budget.spare is None
    assert PAGE == len(array)


def test_mapping_that_cannot_be_resized_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the operating system refuses to resize the retained mapping, a body gets a new one."""
    budget, first, second = two(100)
    first.allocate(PAGE)
    first.release()
    assert budget.spare is not None
    refusing = budget.spare
    monkeypatch.setattr(Mapping, "resize", lambda *_: False)
    assert PAGE == len(second.allocate(PAGE))
    assert second.mapping is not refusing


def test_resized_mapping_has_a_new_view() -> None:
    """A resized mapping keeps its bytes and has a view of the new length; the old view is invalid."""
    mapping = Mapping(PAGE, huge_pages=False)
    old = mapping.view
    old[:4] = b"kept"
    assert mapping.resize(3 * PAGE)
    assert (3 * PAGE, b"kept") == (len(mapping), bytes(mapping.view[:4]))
    assert 3 * PAGE == len(mapping.view)
    with pytest.raises(ValueError, match="released"):
        len(old)


def test_resize_of_a_mapping_in_use_fails() -> None:
    """A mapping whose view an array uses is not resized, and its bytes are unchanged."""
    mapping = Mapping(PAGE, huge_pages=False)
    mapping.view[:4] = b"kept"
    array = np.frombuffer(mapping.view, np.uint8)
    assert mapping.resize(2 * PAGE) is False
    mapping.close()
    assert b"kept" == array[:4].tobytes()
    assert PAGE == len(array)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_huge_pages_are_only_for_a_single_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large body gets huge pages if no other body is charged, else small ones; all mappings are private."""
    flags: list[int] = []
    advice: list[list[int]] = []

    class Recorded(mmap.mmap):
        def __new__(cls, *args: Any, **options: Any) -> "Recorded":
            flags.append(options["flags"])
            advice.append([])
            return super().__new__(cls, *args, **options)

        def madvise(self, option: int, *_: int) -> None:
            advice[-1].append(option)

    monkeypatch.setattr(mmap, "mmap", Recorded)
    _, first, second = two(100)
    first.allocate(PAGE)
    first.take(1)
    second.allocate(PAGE)
    assert [[mmap.MADV_HUGEPAGE], []] == advice
    assert [mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS] * 2 == flags
