"""The replay itself: flights to a service when their time has come, then the ends of engines that failed."""

import time
from collections.abc import Iterator
from typing import Any

import orjson

from model.contract import CHANNELS
from model.data import telemetry
from model.data.cmapss import DataError
from model.data.simulator.drift_injection import Planted
from service.errors import InvalidInput
from service.replay.client import CallFailed, Client
from service.replay.display import Lines, Tally, board
from service.replay.flights import Flight, recorded, simulated
from service.replay.options import SIMULATED, Options

AT_ONCE = 500  # flights of one call, where so many are due
EARLY_SECONDS = 10.0  # that flights may come too early which are told together with known ones


def replay(options: Options) -> int:
    """Send a fleet; 0 when all was told or one was told to stop, 1 if the service knew flights otherwise.

    Raises:
        CallFailed: the service refuses, or did not answer for too long.
        InvalidInput: a file that cannot be read, or drift that it cannot have.
    """
    tally = Tally(options.url, drifts=tuple((drift.since, drift.text) for drift in options.drifts))
    shown = board(tally)
    client = Client(options.url, options.key, options.patience, shown.wait, shown.trouble)
    shown.start()
    try:
        about = client.call("GET", "/v1/model").body
        channels, most = _understood(options.url, about, tally)
        flights = limited(_flights(options, channels), options.count)
        for chunk in due(flights, options.speed, most, shown, tally):
            send(client, chunk, tally, shown)
    except KeyboardInterrupt:
        shown.say("stopped; the same command goes on from the beginning and changes nothing that is known")
    finally:
        shown.stop()
        client.close()
    print(tally.summary(), flush=True)
    if tally.conflicts:
        raise CallFailed(f"{tally.conflicts} conflicts with what is remembered, the first: {tally.first_conflict}")
    return 0


def _understood(url: str, about: Any, tally: Tally) -> tuple[tuple[str, ...], int]:
    """The channels of a model and the most flights of a call, from what the service says of itself."""
    try:
        tally.classes = tuple(about["classes"])
        return tuple(channel["name"] for channel in about["channels"]), int(about["limits"]["max_instances"])
    except (KeyError, TypeError, ValueError):
        raise CallFailed(f"{url}: what answers there is no engine-health") from None


def _flights(options: Options, channels: tuple[str, ...]) -> Iterator[Flight]:
    planted = Planted(options.drifts)
    if options.drifts and channels != CHANNELS:
        raise InvalidInput("--drift: the model that answers does not read C-MAPSS's channels")
    if options.fleet == SIMULATED:
        if channels != CHANNELS:
            raise InvalidInput("--fleet simulated: the model that answers does not read C-MAPSS's channels")
        return simulated(options.engines or 20, options.seed, planted, options.endless, options.past)
    if planted.wears:
        raise InvalidInput("--drift wear: what has been recorded wears no faster; only a simulated fleet does")
    try:
        return recorded(telemetry.read(options.fleet, channels)[: options.engines], options.seed, planted)
    except DataError as error:
        raise InvalidInput(str(error)) from None


def limited(flights: Iterator[Flight], count: int | None) -> Iterator[Flight]:
    """Not more than so many flights that are not past."""
    left = count
    for flight in flights:
        if left is not None and not flight.past:
            if left <= 0:
                return
            left -= 1
        yield flight


def due(flights: Iterator[Flight], speed: float, most: int, shown: Lines, tally: Tally) -> Iterator[list[Flight]]:
    """Flights in groups, each when its time has come: one by one, or together where the service is behind.

    Args:
        flights: in their order; past ones are due at once, and so are the first ones as long as they are known.
        speed: flights a second.
        most: flights of a group.
        shown: what waits.
        tally: what became of those before.
    """
    group: list[Flight] = []
    began, flown, most = 0.0, 0, min(most, AT_ONCE)
    together = max(1, int(min(most, speed * EARLY_SECONDS)))
    for flight in flights:
        apart = group and not flight.past and (group[-1].past or _ahead(began, flown, speed) > 0)
        if apart and not tally.again:
            yield group
            group = []
        if tally.again:  # time begins with what was not told before
            began, flown = time.monotonic(), len(group)
        elif not flight.past:
            began = began or time.monotonic()
            shown.wait(_ahead(began, flown, speed))
        flown += not flight.past
        group.append(flight)
        if len(group) >= (together if tally.again else most):
            yield group
            group = []
    if group:
        yield group


def _ahead(began: float, flown: int, speed: float) -> float:
    """Seconds until the next flight is due."""
    return began + flown / speed - time.monotonic()


def send(client: Client, flights: list[Flight], tally: Tally, shown: Lines) -> None:
    """Tell a service of flights, and of the ends among them once all of them are told."""
    if tally.began is None and not flights[-1].past:
        tally.began = time.monotonic()
    rows = [{"engine_id": f.engine_id, "cycle": f.cycle, "telemetry": f.telemetry} for f in flights]
    answer = client.call("POST", "/v1/cycles", orjson.dumps({"cycles": rows}, option=orjson.OPT_SERIALIZE_NUMPY))
    results = answer.body.get("results")
    if results is None:
        raise CallFailed(f"{client.url}: {answer.body.get('detail')}")
    predictions = answer.body.get("predictions") or [None] * len(flights)
    for flight, result, found in zip(flights, results, predictions, strict=True):
        tally.known += not flight.past and tally.known == tally.live and result["result"] == "unchanged"
        tally.flights, tally.live = tally.flights + 1, tally.live + (not flight.past)
        if found is not None:
            tally.latest[flight.engine_id] = found
        if result["result"] == "conflict":
            _conflict(tally, f"engine {flight.engine_id}, cycle {flight.cycle}")
    tally.repeated = client.repeated
    for flight in flights:
        if flight.failed_at is not None:
            _end(client, flight, flight.failed_at, tally, shown)
    shown.refresh()


def _end(client: Client, last: Flight, failed_at: int, tally: Tally, shown: Lines) -> None:
    told = orjson.dumps({"engine_id": last.engine_id, "failed_at_cycle": failed_at})
    answer = client.call("POST", "/v1/outcomes", told)
    tally.latest.pop(last.engine_id, None)
    if answer.status == 409:
        _conflict(tally, f"the end of engine {last.engine_id} at cycle {failed_at}")
        return
    tally.ends += 1
    if not last.past:
        labelled = answer.body.get("labelled")
        shown.say(f"{last.engine_id} failed at cycle {failed_at}; {labelled} more predictions have their truth")


def _conflict(tally: Tally, what: str) -> None:
    tally.conflicts += 1
    tally.first_conflict = tally.first_conflict or what
