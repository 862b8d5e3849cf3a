"""The replay: send each flight to a service when it is due, then the failures of engines."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import orjson

from model.contract import CHANNELS
from model.data import telemetry
from model.data.cmapss import DataError
from model.data.simulator.drift_injection import DriftInjector
from service.errors import InvalidInput
from service.replay.client import CallFailed, RetryingClient
from service.replay.display import LogDisplay, ReplayState
from service.replay.flights import ReplayFlight, recorded_flights, simulated_flights
from service.replay.options import SIMULATED, ReplayOptions

MAX_FLIGHTS_PER_CALL = 500
RESUME_HINT = "run the same command to continue: flights that are stored are not changed"
EARLY_SECONDS = 10.0  # a call with stored flights may send others this early


def replay_fleet(options: ReplayOptions, hint: str = RESUME_HINT) -> int:
    """Send a fleet to a service. Return 0 when all flights were sent or the user interrupted the replay.

    Args:
        options: fleet, service and speed.
        hint: printed on an interruption, after "stopped".

    Raises:
        CallFailed: the service rejected a call, was unavailable for too long, or has other flights for the same cycles.
        InvalidInput: the file cannot be read, or the drift does not apply to the fleet.
    """
    state = ReplayState(options.url, drifts=tuple((drift.since, drift.text) for drift in options.drifts))
    display = open_display(state)
    client = RetryingClient(options.url, options.key, options.patience, display.wait, display.show_outage)
    display.start()
    try:
        model_info = client.call("GET", "/v1/model").body
        channels, max_instances = _read_model_info(options.url, model_info, state)
        flights = limit_flights(_open_fleet(options, channels), options.count)
        for group in group_due_flights(flights, options.speed, max_instances, display, state):
            send_flights(client, group, state, display)
    except KeyboardInterrupt:
        display.print_line(f"stopped; {hint}")
    finally:
        display.stop()
        client.close()
    print(state.format_summary(), flush=True)
    if state.conflicts:
        raise CallFailed(f"{state.conflicts} conflicts with stored flights, the first: {state.first_conflict}")
    return 0


def open_display(state: ReplayState) -> LogDisplay:
    """Return a live table on a terminal, or a log where there is no terminal or `rich` is not installed."""
    if sys.stdout.isatty():
        try:
            from service.replay.rich_table import TableDisplay
        except ImportError:
            return LogDisplay(state)
        return TableDisplay(state)
    return LogDisplay(state)


def _read_model_info(url: str, model_info: Any, state: ReplayState) -> tuple[tuple[str, ...], int]:
    """Return the channels of the model and the maximum number of flights of a call."""
    try:
        state.classes = tuple(model_info["classes"])
        channels = tuple(channel["name"] for channel in model_info["channels"])
        return channels, int(model_info["limits"]["max_instances"])
    except (KeyError, TypeError, ValueError):
        raise CallFailed(f"{url}: the server at this URL is not engine-health") from None


def _open_fleet(options: ReplayOptions, channels: tuple[str, ...]) -> Iterator[ReplayFlight]:
    injector = DriftInjector(options.drifts)
    if options.drifts and channels != CHANNELS:
        raise InvalidInput("--drift: the model of the service does not use the C-MAPSS channels")
    if options.fleet == SIMULATED:
        if channels != CHANNELS:
            raise InvalidInput("--fleet simulated: the model of the service does not use the C-MAPSS channels")
        return simulated_flights(options.engines or 20, options.seed, injector, options.endless, options.past)
    if injector.changes_wear:
        raise InvalidInput("--drift wear: not possible for recorded flights; use --fleet simulated")
    try:
        return recorded_flights(
            telemetry.read_histories(options.fleet, channels)[: options.engines], options.seed, injector
        )
    except DataError as error:
        raise InvalidInput(str(error)) from None


def limit_flights(flights: Iterator[ReplayFlight], count: int | None) -> Iterator[ReplayFlight]:
    """Stop after `count` flights, past ones not counted."""
    remaining = count
    for flight in flights:
        if remaining is not None and not flight.past:
            if remaining <= 0:
                return
            remaining -= 1
        yield flight


def group_due_flights(
    flights: Iterator[ReplayFlight], speed: float, max_group: int, display: LogDisplay, state: ReplayState
) -> Iterator[list[ReplayFlight]]:
    """Yield flights when they are due: single flights, or groups where the service is slower than `speed`.

    Args:
        flights: in order. Past flights are due immediately, as are leading flights that the service has stored.
        speed: flights per second.
        max_group: maximum number of flights of a group.
        display: waits until the next flight is due.
        state: result of the flights sent so far.
    """
    group: list[ReplayFlight] = []
    started_at, sent, max_group = 0.0, 0, min(max_group, MAX_FLIGHTS_PER_CALL)
    max_stored_group = max(1, int(min(max_group, speed * EARLY_SECONDS)))
    for flight in flights:
        starts_group = group and not flight.past and (group[-1].past or _seconds_until_due(started_at, sent, speed) > 0)
        if starts_group and not state.catching_up:
            yield group
            group = []
        if state.catching_up:  # the schedule starts with the first flight that is new to the service
            started_at, sent = time.monotonic(), len(group)
        elif not flight.past:
            started_at = started_at or time.monotonic()
            display.wait(_seconds_until_due(started_at, sent, speed))
        sent += not flight.past
        group.append(flight)
        if len(group) >= (max_stored_group if state.catching_up else max_group):
            yield group
            group = []
    if group:
        yield group


def _seconds_until_due(started_at: float, sent: int, speed: float) -> float:
    return started_at + sent / speed - time.monotonic()


def send_flights(client: RetryingClient, flights: list[ReplayFlight], state: ReplayState, display: LogDisplay) -> None:
    """Send flights in one call, then the failures among them."""
    if state.started_at is None and not flights[-1].past:
        state.started_at = time.monotonic()
    rows = [{"engine_id": f.engine_id, "cycle": f.cycle, "telemetry": f.telemetry} for f in flights]
    response = client.call("POST", "/v1/cycles", orjson.dumps({"cycles": rows}, option=orjson.OPT_SERIALIZE_NUMPY))
    results = response.body.get("results")
    if results is None:
        raise CallFailed(f"{client.url}: {response.body.get('detail')}")
    predictions = response.body.get("predictions") or [None] * len(flights)
    for flight, result, prediction in zip(flights, results, predictions, strict=True):
        unchanged = result["result"] == "unchanged"
        state.stored_flights += not flight.past and unchanged and state.stored_flights == state.live_flights
        state.flights, state.live_flights = state.flights + 1, state.live_flights + (not flight.past)
        if prediction is not None:
            state.latest[flight.engine_id] = prediction
        if result["result"] == "conflict":
            _record_conflict(state, f"engine {flight.engine_id}, cycle {flight.cycle}")
    state.retries = client.retries
    for flight in flights:
        if flight.failed_at is not None:
            _send_failure(client, flight, flight.failed_at, state, display)
    display.refresh()


def _send_failure(
    client: RetryingClient, last_flight: ReplayFlight, failed_at: int, state: ReplayState, display: LogDisplay
) -> None:
    engine_id = last_flight.engine_id
    outcome = orjson.dumps({"engine_id": engine_id, "failed_at_cycle": failed_at})
    response = client.call("POST", "/v1/outcomes", outcome)
    state.latest.pop(engine_id, None)
    if response.status == 409:
        _record_conflict(state, f"failure of engine {engine_id} at cycle {failed_at}")
        return
    state.failures += 1
    if not last_flight.past:
        labelled = response.body.get("labelled")
        display.print_line(f"{engine_id} failed at cycle {failed_at}; {labelled} more predictions are labelled")


def _record_conflict(state: ReplayState, description: str) -> None:
    state.conflicts += 1
    state.first_conflict = state.first_conflict or description
