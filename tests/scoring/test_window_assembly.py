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
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the engine states."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink blocks and units to a few rows, so that tests cross every boundary."""
    monkeypatch.setattr(window_assembly, "RELEASE_ROWS", 5)
    monkeypatch.setattr(window_assembly, "MAX_LAID_OUT_ROWS", 30)


def reading_of(engine: str, cycle: int) -> list[float]:
    """Return a reading that is different for each engine and cycle."""
    return [ord(engine) * 1000.0 + cycle, -float(cycle)]


def assemble(
    flights: list[Flight],
    state_folder: Path,
    horizon: int = 0,
    latest: bool = False,
    slots: int = 3,
    chunk_size: int = 7,
    readings: Readings | None = None,
) -> list[WorkUnit]:
    """Return the units of some flights, read in chunks, with slots for the states of `slots` engines."""
    size = 8 * 4 + 4 * CHANNELS * (1 + WINDOW)  # bytes of a state
    with closing(EngineStates(WINDOW, CHANNELS, state_folder, slots * size)) as states:
        return _units(
            WindowAssembler(
                states, ["file"], Options(("file",), state_folder, horizon=horizon, latest=latest, part_rows=6)
            ),
            flights,
            chunk_size,
            readings,
        )


def _units(
    assembler: WindowAssembler, flights: list[Flight], chunk_size: int, readings: Readings | None
) -> list[WorkUnit]:
    values = np.array([reading_of(*item) for item in flights], np.float32) if readings is None else readings

    def every() -> Iterator[WorkUnit]:
        for i in range(0, len(flights), chunk_size):
            chunk = flights[i : i + chunk_size]
            names, cycles = pa.array([e for e, _ in chunk], pa.string()), np.array([c for _, c in chunk])
            yield from assembler.add_rows(
                Rows(names, cycles, values[i : i + chunk_size].copy(), cycles * 0 - 1, i + np.arange(len(chunk))),
                0,
                [],
                0.0,
            )
        yield from assembler.flush()

    return list(every())


def windows_of(result: list[WorkUnit]) -> list[tuple[Flight, Readings]]:
    """Return engine and cycle of each row with its window, in order."""
    return [
        ((unit.engine_ids[i].as_py(), int(unit.cycle[i])), unit.flat[start : start + WINDOW])
        for unit in result
        for i, start in enumerate(unit.starts)
    ]


def rejects_of(result: list[WorkUnit]) -> list[Reject]:
    """Return all rejected rows."""
    return [item for unit in result for item in unit.rejects]


def cycles_by_engine(flights: list[Flight]) -> dict[str, list[int]]:
    """Return the sorted cycles of each engine."""
    cycles = defaultdict(list)
    for engine, cycle in sorted(flights):
        cycles[engine].append(cycle)
    return cycles


fleets = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 60)), unique=True, max_size=80)


@hypothesis_settings(max_examples=80)
@given(fleet=fleets, chunk_size=st.integers(1, 30))
def test_window_is_the_padded_history_up_to_its_cycle(fleet: list[Flight], chunk_size: int, state_folder: Path) -> None:
    """Ordered rows of interleaved engines keep their order and have the windows of training."""
    place: dict[int, int] = {}
    for engine, own_cycles in cycles_by_engine(fleet).items():
        place |= dict(zip([k for k, item in enumerate(fleet) if item[0] == engine], own_cycles, strict=True))
    flights = [(engine, place[k]) for k, (engine, _) in enumerate(fleet)]
    result = assemble(flights, state_folder, chunk_size=chunk_size)
    assert flights == [flight for flight, _ in windows_of(result)]
    assert [] == rejects_of(result)
    cycles = cycles_by_engine(flights)
    for (engine, cycle), window in windows_of(result):
        history = np.array([reading_of(engine, c) for c in cycles[engine] if c <= cycle], np.float32)
        assert np.array_equal(pad_left(history, WINDOW), window)


@hypothesis_settings(max_examples=80)
@given(fleet=fleets, horizon=st.integers(0, 20), data=st.data())
def test_rows_within_the_horizon_are_reordered(
    fleet: list[Flight], horizon: int, data: st.DataObject, state_folder: Path
) -> None:
    """Each row that is late by at most the horizon is scored once, with the window of the ordered file."""
    ordered = sorted(fleet, key=lambda item: (item[1], item[0]))
    shifts = data.draw(st.lists(st.integers(0, horizon), min_size=len(ordered), max_size=len(ordered)))
    flights = [ordered[k] for k in np.argsort([k + shift for k, shift in enumerate(shifts)], kind="stable")]
    result = assemble(flights, state_folder, horizon=horizon)
    assert [] == rejects_of(result)
    assert sorted(flights) == sorted(flight for flight, _ in windows_of(result))
    cycles = cycles_by_engine(flights)
    for (engine, cycle), window in windows_of(result):
        history = np.array([reading_of(engine, c) for c in cycles[engine] if c <= cycle], np.float32)
        assert np.array_equal(pad_left(history, WINDOW), window)


@hypothesis_settings(max_examples=50)
@given(fleet=fleets)
def test_latest_is_the_newest_window_of_each_engine(fleet: list[Flight], state_folder: Path) -> None:
    """`latest` gives one window per engine, by first appearance, whatever the order of the rows."""
    result = windows_of(assemble(fleet, state_folder, horizon=100, latest=True))
    cycles = cycles_by_engine(fleet)
    assert [(e, cycles[e][-1]) for e in dict.fromkeys(e for e, _ in fleet)] == [flight for flight, _ in result]
    for (engine, _), window in result:
        assert np.array_equal(
            pad_left(np.array([reading_of(engine, c) for c in cycles[engine]], np.float32), WINDOW), window
        )


@hypothesis_settings(max_examples=60)
@given(fleet=fleets, gaps=st.sets(st.tuples(st.integers(0, 79), st.integers(0, 1))))
def test_missing_values_are_held_across_units(
    fleet: list[Flight], gaps: set[tuple[int, int]], state_folder: Path
) -> None:
    """A missing value is the last one of its engine and channel. Without an earlier value the row is rejected."""
    flights = sorted(fleet, key=lambda item: (item[1], item[0]))
    values = np.array([reading_of(*item) for item in flights], np.float32).reshape(-1, CHANNELS)
    for row, channel in gaps:
        if row < len(flights):
            values[row, channel] = np.nan
    result = assemble(flights, state_folder, readings=values)
    answered = dict(windows_of(result))
    lacking = {item.row for item in rejects_of(result)}
    for engine in {e for e, _ in flights}:
        mine = [k for k, item in enumerate(flights) if item[0] == engine]
        filled = hold_last(values[mine])[0]
        whole = np.asarray(~np.isnan(filled).any(axis=1))
        assert {k for k, fit in zip(mine, whole, strict=True) if not fit} == lacking & set(mine)
        for n, k in enumerate(mine):
            if whole[n]:
                assert np.array_equal(pad_left(filled[: n + 1][whole[: n + 1]], WINDOW), answered[flights[k]])


def test_row_beyond_the_horizon_is_rejected(tmp_path: Path) -> None:
    """A cycle that comes after later ones were scored is rejected, with both cycles. Other rows are unaffected."""
    flights = [("a", cycle) for cycle in range(10, 30)] + [("a", 9)] + [("a", cycle) for cycle in range(30, 40)]
    result = assemble(flights, tmp_path, horizon=3)
    assert [("a", cycle) for cycle in range(10, 40)] == [flight for flight, _ in windows_of(result)]
    assert [20] == [item.row for item in rejects_of(result)]
    assert rejects_of(result)[0].reason.startswith("cycle 9 comes after cycle")
    assert "horizon of 3 rows" in rejects_of(result)[0].reason


def test_duplicate_cycle_is_rejected(tmp_path: Path) -> None:
    """A duplicate of a cycle is rejected, in the same block and in a later one."""
    flights = [("a", 1), ("a", 2), ("a", 2), *[("b", cycle) for cycle in range(20)], ("a", 2), ("a", 3)]
    result = assemble(flights, tmp_path)
    assert [2, 23] == [item.row for item in rejects_of(result)]
    assert {"cycle 2 of its engine is a duplicate of an earlier row"} == {item.reason for item in rejects_of(result)}
    assert [1, 2, 3] == [cycle for (engine, cycle), _ in windows_of(result) if engine == "a"]


def test_states_beyond_the_slots_are_kept_in_a_file(tmp_path: Path) -> None:
    """With slots for two engines, 40 interleaved engines have the windows of their whole histories."""
    names = [chr(200 + k) for k in range(40)]
    flights = [(name, cycle) for cycle in range(8) for name in names]
    result = assemble(flights, tmp_path, slots=2)
    for (engine, cycle), window in windows_of(result):
        history = np.array([reading_of(engine, c) for c in range(cycle + 1)], np.float32)
        assert np.array_equal(pad_left(history, WINDOW), window)
    assert len(flights) == len(windows_of(result))


def test_unit_rows_stay_within_the_limit(tmp_path: Path) -> None:
    """The rows of a unit, with the earlier rows of its engines, stay within the limit for any number of engines."""
    flights = [(chr(200 + k), cycle) for cycle in range(4) for k in range(50)]
    assert (
        max(len(unit.flat) for unit in assemble(flights, tmp_path, horizon=60, slots=50))
        <= window_assembly.MAX_LAID_OUT_ROWS
    )
