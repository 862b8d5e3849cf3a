from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from model.windows import Readings, hold_last, pad_left
from service.scoring import window_assembly
from service.scoring.engine_states import EngineStates
from service.scoring.options import Options
from service.scoring.rows import Reject, Rows
from service.scoring.window_assembly import WindowAssembler, WorkUnit

WINDOW, CHANNELS = 4, 2
Flight = tuple[str, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where states are kept."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and units of a few rows, so that every boundary is crossed."""
    monkeypatch.setattr(window_assembly, "RELEASE_ROWS", 5)
    monkeypatch.setattr(window_assembly, "MAX_LAID_OUT_ROWS", 30)


def reading(engine: str, cycle: int) -> list[float]:
    """What the sensors of an engine said; no two alike."""
    return [ord(engine) * 1000.0 + cycle, -float(cycle)]


def units(
    flights: list[Flight],
    folder: Path,
    horizon: int = 0,
    latest: bool = False,
    places: int = 3,
    piece: int = 7,
    readings: Readings | None = None,
) -> list[WorkUnit]:
    """The units of some flights, read in pieces, with room for the states of three engines."""
    size = 8 * 4 + 4 * CHANNELS * (1 + WINDOW)  # bytes of a state
    with closing(EngineStates(WINDOW, CHANNELS, folder, places * size)) as states:
        return _units(
            WindowAssembler(states, ["file"], Options(("file",), folder, horizon=horizon, latest=latest, part_rows=6)),
            flights,
            piece,
            readings,
        )


def _units(assembler: WindowAssembler, flights: list[Flight], piece: int, readings: Readings | None) -> list[WorkUnit]:
    values = np.array([reading(*one) for one in flights], np.float32) if readings is None else readings

    def every() -> Iterator[WorkUnit]:
        for i in range(0, len(flights), piece):
            some = flights[i : i + piece]
            names, cycles = pa.array([e for e, _ in some], pa.string()), np.array([c for _, c in some])
            yield from assembler.add_rows(
                Rows(names, cycles, values[i : i + piece].copy(), cycles * 0 - 1, i + np.arange(len(some))), 0, [], 0.0
            )
        yield from assembler.flush()

    return list(every())


def windows_of(found: list[WorkUnit]) -> list[tuple[Flight, Readings]]:
    """Each row's engine and cycle with its window, in order."""
    return [
        ((unit.engine_ids[i].as_py(), int(unit.cycle[i])), unit.flat[start : start + WINDOW])
        for unit in found
        for i, start in enumerate(unit.starts)
    ]


def rejects_of(found: list[WorkUnit]) -> list[Reject]:
    """All rejected rows."""
    return [one for unit in found for one in unit.rejects]


def histories(flights: list[Flight]) -> dict[str, list[int]]:
    """The cycles of each engine, in order."""
    known = defaultdict(list)
    for engine, cycle in sorted(flights):
        known[engine].append(cycle)
    return known


fleets = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 60)), unique=True, max_size=80)


@hypothesis_settings(max_examples=80)
@given(fleet=fleets, piece=st.integers(1, 30))
def test_a_window_is_the_padded_history_up_to_its_cycle(fleet: list[Flight], piece: int, folder: Path) -> None:
    """Rows in order, however engines interleave, come out as they came in, with training's windows."""
    place: dict[int, int] = {}
    for engine, cycles in histories(fleet).items():
        place |= dict(zip([k for k, one in enumerate(fleet) if one[0] == engine], cycles, strict=True))
    flights = [(engine, place[k]) for k, (engine, _) in enumerate(fleet)]
    found = units(flights, folder, piece=piece)
    assert flights == [flight for flight, _ in windows_of(found)]
    assert [] == rejects_of(found)
    known = histories(flights)
    for (engine, cycle), window in windows_of(found):
        history = np.array([reading(engine, c) for c in known[engine] if c <= cycle], np.float32)
        assert np.array_equal(pad_left(history, WINDOW), window)


@hypothesis_settings(max_examples=80)
@given(fleet=fleets, horizon=st.integers(0, 20), data=st.data())
def test_rows_out_of_order_within_the_horizon_find_their_place(
    fleet: list[Flight], horizon: int, data: st.DataObject, folder: Path
) -> None:
    """Moved by no more than the horizon, every row is scored once, with the window of the ordered file."""
    ordered = sorted(fleet, key=lambda one: (one[1], one[0]))
    shifts = data.draw(st.lists(st.integers(0, horizon), min_size=len(ordered), max_size=len(ordered)))
    flights = [ordered[k] for k in np.argsort([k + shift for k, shift in enumerate(shifts)], kind="stable")]
    found = units(flights, folder, horizon=horizon)
    assert [] == rejects_of(found)
    assert sorted(flights) == sorted(flight for flight, _ in windows_of(found))
    known = histories(flights)
    for (engine, cycle), window in windows_of(found):
        history = np.array([reading(engine, c) for c in known[engine] if c <= cycle], np.float32)
        assert np.array_equal(pad_left(history, WINDOW), window)


@hypothesis_settings(max_examples=50)
@given(fleet=fleets)
def test_latest_is_the_newest_window_of_each_engine(fleet: list[Flight], folder: Path) -> None:
    """One window an engine, by first appearance, whatever the order of its rows."""
    found = windows_of(units(fleet, folder, horizon=100, latest=True))
    known = histories(fleet)
    assert [(e, known[e][-1]) for e in dict.fromkeys(e for e, _ in fleet)] == [flight for flight, _ in found]
    for (engine, _), window in found:
        assert np.array_equal(
            pad_left(np.array([reading(engine, c) for c in known[engine]], np.float32), WINDOW), window
        )


@hypothesis_settings(max_examples=60)
@given(fleet=fleets, gaps=st.sets(st.tuples(st.integers(0, 79), st.integers(0, 1))))
def test_missing_values_are_held_over_any_boundary(
    fleet: list[Flight], gaps: set[tuple[int, int]], folder: Path
) -> None:
    """A missing value is the last seen one of its engine and channel; before the first, its row is rejected."""
    flights = sorted(fleet, key=lambda one: (one[1], one[0]))
    values = np.array([reading(*one) for one in flights], np.float32).reshape(-1, CHANNELS)
    for row, channel in gaps:
        if row < len(flights):
            values[row, channel] = np.nan
    found = units(flights, folder, readings=values)
    answered = dict(windows_of(found))
    lacking = {one.row for one in rejects_of(found)}
    for engine in {e for e, _ in flights}:
        mine = [k for k, one in enumerate(flights) if one[0] == engine]
        filled = hold_last(values[mine])[0]
        whole = np.asarray(~np.isnan(filled).any(axis=1))
        assert {k for k, fit in zip(mine, whole, strict=True) if not fit} == lacking & set(mine)
        for n, k in enumerate(mine):
            if whole[n]:
                assert np.array_equal(pad_left(filled[: n + 1][whole[: n + 1]], WINDOW), answered[flights[k]])


def test_a_row_beyond_the_horizon_is_rejected_and_the_others_are_not(tmp_path: Path) -> None:
    """A cycle that comes after later ones were scored is named with both cycles; what was scored stands."""
    flights = [("a", cycle) for cycle in range(10, 30)] + [("a", 9)] + [("a", cycle) for cycle in range(30, 40)]
    found = units(flights, tmp_path, horizon=3)
    assert [("a", cycle) for cycle in range(10, 40)] == [flight for flight, _ in windows_of(found)]
    assert [20] == [one.row for one in rejects_of(found)]
    assert rejects_of(found)[0].reason.startswith("cycle 9 comes after cycle")
    assert "horizon of 3 rows" in rejects_of(found)[0].reason


def test_of_two_rows_of_one_cycle_the_first_counts(tmp_path: Path) -> None:
    """The same cycle again is rejected, in the same block and long after."""
    flights = [("a", 1), ("a", 2), ("a", 2), *[("b", cycle) for cycle in range(20)], ("a", 2), ("a", 3)]
    found = units(flights, tmp_path)
    assert [2, 23] == [one.row for one in rejects_of(found)]
    assert {"cycle 2 of its engine is a duplicate of an earlier row"} == {one.reason for one in rejects_of(found)}
    assert [1, 2, 3] == [cycle for (engine, cycle), _ in windows_of(found) if engine == "a"]


def test_more_engines_than_places_are_kept_in_a_file(tmp_path: Path) -> None:
    """With room for two engines, forty that come in turn have the windows of their whole histories."""
    names = [chr(200 + k) for k in range(40)]
    flights = [(name, cycle) for cycle in range(8) for name in names]
    found = units(flights, tmp_path, places=2)
    for (engine, cycle), window in windows_of(found):
        history = np.array([reading(engine, c) for c in range(cycle + 1)], np.float32)
        assert np.array_equal(pad_left(history, WINDOW), window)
    assert len(flights) == len(windows_of(found))


def test_a_unit_lays_out_no_more_than_its_limit(tmp_path: Path) -> None:
    """However many engines wait, the rows of a unit with those before them stay below the limit."""
    flights = [(chr(200 + k), cycle) for cycle in range(4) for k in range(50)]
    assert (
        max(len(unit.flat) for unit in units(flights, tmp_path, horizon=60, places=50))
        <= window_assembly.MAX_LAID_OUT_ROWS
    )
