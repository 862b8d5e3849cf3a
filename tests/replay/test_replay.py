import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from benchmarks.load import free_port
from model.contract import CHANNELS
from model.data import telemetry
from model.data.cmapss import DataError
from model.data.simulator import fleet as simulate
from model.data.simulator.drift_injection import DriftInjector
from service import cli
from service.replay.client import CallFailed, RetryingClient
from service.replay.demo import main as demo_main
from service.replay.display import LogDisplay, ReplayState
from service.replay.flights import simulated_flights
from service.replay.rich_table import TableDisplay
from service.replay.run import limit_flights
from tests.support.files import as_csv, as_text
from tests.support.processes import Service, running, serving, start

FAST = ("--speed", "max", "--patience", "30")


def url_of(service: Service) -> str:
    return str(service.client.base_url).rstrip("/")


def replayed(service: Service, *flags: str) -> int:
    return cli.main(["replay", "--url", url_of(service), *FAST, *flags])


def known(service: Service, engine_id: str) -> bool:
    return service.client.get(f"/v1/engines/{engine_id}").status_code == 200


def history(service: Service, engine_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.client.get(f"/v1/engines/{engine_id}").json()["history"]
    return found


@pytest.fixture(scope="module")
def kept() -> Iterator[Service]:
    """One service, and one memory, for the replays that do not disturb each other: each has a seed of its own."""
    with running() as found:
        yield found


def test_a_fleet_flies_until_it_has_failed(kept: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flight is predicted, every end labels its engine's history, and to say all of it again changes nothing."""
    for _ in range(2):
        assert 0 == replayed(kept, "--engines", "2", "--seed", "11")
        said = capsys.readouterr().out
        assert "2 failures sent" in said
        assert "conflict" not in said
    for number in range(2):
        life = int(simulate.SimulatedEngine(number, 11, mixed=True).remaining)
        found = history(kept, f"sim11-{number}")
        assert list(range(1, life + 1)) == [row["cycle"] for row in found]
        assert ["critical"] * 51 == [row["label"] for row in found[-51:]]
        assert all(row["label"] is not None for row in found)


def test_what_is_known_is_not_waited_for(kept: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same replay again, as of a container started anew, comes to what is new and waits for nothing else."""
    fleet = ("--engines", "3", "--seed", "23", "--past", "2")
    assert 0 == replayed(kept, *fleet, "--count", "60")
    waits: list[float] = []
    monkeypatch.setattr(LogDisplay, "wait", lambda _, seconds: waits.append(seconds))
    assert 0 == replayed(kept, *fleet, "--count", "64", "--speed", "2/min")
    assert 3 == sum(seconds > 0 for seconds in waits)  # 64 - 60 new ones, of which nobody waits for the first
    flown = list(limit_flights(simulated_flights(3, 23, DriftInjector(), endless=False, retired=2), 64))
    assert len(flown) == sum(len(history(kept, engine)) for engine in {flight.engine_id for flight in flown})


def test_a_count_ends_a_replay_without_ends(kept: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """`--count` stops after so many flights; engines that still fly are given no end."""
    assert 0 == replayed(kept, "--engines", "5", "--seed", "12", "--count", "23")
    assert "23 flights; 5 engines" in capsys.readouterr().out
    assert [5, 5, 5, 4, 4] == [len(history(kept, f"sim12-{number}")) for number in range(5)]


def test_recorded_engines_fly_in_turn(kept: Service, tmp_path: Path) -> None:
    """C-MAPSS text and CSV are sent as they stand; an end is told where the file knows it, and nowhere else."""
    engines = list(simulate.simulate_histories(2, seed=13))
    named = tmp_path / "train_FD009.txt"
    named.write_text(as_text(engines))
    assert 0 == replayed(kept, "--fleet", str(named))
    table = tmp_path / "table.csv"
    table.write_text(as_csv(engines))
    assert 0 == replayed(kept, "--fleet", str(table), "--engines", "1")
    found = history(kept, "FD009-2")
    assert len(engines[1].cycle) == len(found)
    assert "critical" == found[-1]["label"]
    assert [None] == [row["label"] for row in history(kept, "sim13-0")[-1:]]
    assert 404 == kept.client.get("/v1/engines/sim13-1").status_code


class Unreliable(ThreadingHTTPServer):
    """In front of a real service: every so often it is busy, breaks off before the call, or loses its answer."""

    daemon_threads = True

    def __init__(self, service: str) -> None:
        super().__init__(("127.0.0.1", 0), _Broken)
        self.service, self.calls = service, 0


class _Broken(BaseHTTPRequestHandler):
    server: Unreliable
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        self.server.calls += 1
        turn = self.server.calls % 8
        if turn in (1, 3):
            self._answer(429 if turn == 1 else 503, b'{"detail": "busy"}')
        elif turn == 5:
            self.close_connection = True  # before anything was done
        else:
            asked = urllib.request.Request(self.server.service + self.path, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked) as answer:
                text = answer.read()
            if turn == 7:
                self.close_connection = True  # done, and nobody hears of it
            else:
                self._answer(200, text)

    def _answer(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def test_nothing_is_lost_and_nothing_said_twice(kept: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind a service that refuses, breaks off and loses answers, every flight arrives once and as it was."""
    with serving(Unreliable(url_of(kept))) as url:
        assert 0 == cli.main(["replay", "--url", url, *FAST, "--engines", "3", "--seed", "14", "--count", "2000"])
    assert "calls retried" in capsys.readouterr().out
    for number in range(3):
        rows = simulate.SimulatedEngine(number, 14, mixed=True).fly(1000)
        found = history(kept, f"sim14-{number}")
        assert len(rows) == len(found)
        asked = [{"telemetry": rows[max(0, k - 100) : k].tolist()} for k in (1, 50, len(rows))]
        expected = [row["logits"] for row in kept.predict(asked)["predictions"]]
        assert expected == [found[k - 1]["logits"] for k in (1, 50, len(rows))]


def test_a_killed_service_is_waited_for(tmp_path: Path) -> None:
    """A service that is killed and started again on the same memory misses no flight of a replay that goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    memory = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/memory.db"}
    replay = start(
        "replay", "--url", f"http://127.0.0.1:{port}", "--speed", "400/s", "--engines", "3", "--count", "600"
    )
    services = [start("serve", "--port", port, **memory)]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            def remembered() -> int:
                try:
                    return len(client.get("/v1/engines/sim0-0").json().get("history", []))
                except httpx.TransportError:
                    return 0

            until(lambda: remembered() > 20)
            services[0].kill()
            services[0].communicate()
            services.append(start("serve", "--port", port, **memory))
            said, failed = replay.communicate(timeout=60)
            assert 0 == replay.returncode, failed
            assert "waiting for" in said
            assert 200 == remembered()
    finally:
        for process in (*services, replay):
            process.kill()
            process.communicate()


def until(true: Callable[[], bool]) -> None:
    """Wait for what must come; a minute at most."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_contradictions_are_told_and_end_in_one_line(kept: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Flights that the service knows otherwise are counted, the rest goes on, and the exit code is 1."""
    flags = ("--engines", "2", "--seed", "15", "--count", "40")
    assert 0 == replayed(kept, *flags)
    before = history(kept, "sim15-1")
    capsys.readouterr()
    assert 1 == replayed(kept, *flags, "--drift", "sensor_11:+2sd@30")
    said = capsys.readouterr()
    assert "40 flights; 2 engines" in said.out
    assert "engine-health: 10 conflicts with stored flights, the first: engine sim15-0, cycle 16\n" == said.err
    assert before == history(kept, "sim15-1")


def test_planted_drift_is_seen_before_any_label() -> None:
    """A sensor that is biased stands out of the drift that the service tells, without an end or a label."""
    found = []
    with running() as service:
        for flags in (("--seed", "1"), ("--seed", "2", "--drift", "sensor_11:+2sd")):
            assert 0 == replayed(service, "--engines", "30", "--count", "1500", *flags)
            told = service.client.get("/v1/calibration").json()
            assert 0 == told["n"]
            found.append({name: of["psi"] for name, of in told["drift"]["channels"].items()})
    rise = {name: found[1][name] - found[0][name] for name in CHANNELS}
    assert "sensor_11" == max(rise, key=rise.__getitem__)
    assert rise["sensor_11"] > 0.1


def test_a_fleet_in_service_has_a_past() -> None:
    """With `--past` engines that failed before come first, whole; then engines of any age; nobody waits for these."""
    fleet = list(limit_flights(simulated_flights(4, 0, DriftInjector(), endless=True, retired=2), 400))
    past = [flight for flight in fleet if flight.past]
    assert fleet[: len(past)] == past
    assert ["sim0-0", "sim0-1"] == [flight.engine_id for flight in past if flight.failed_at is not None]
    ages = [sum(flight.engine_id == f"sim0-{k}" for flight in past) for k in range(2, 6)]
    assert 4 == len(set(ages))
    assert 400 == len(fleet) - len(past)
    failed = sum(flight.failed_at is not None for flight in fleet) - 2
    assert 4 + failed == len({flight.engine_id for flight in fleet if not flight.past})


def test_what_cannot_be_replayed_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No service, no key or a wrong one, no memory, a wrong address or file: exit code 1 and a line that says which."""
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("engine_id,cycle\n")
    with running(ENGINE_HEALTH_DATABASE_URL="", ENGINE_HEALTH_API_KEYS="secret,other") as stateless:
        url, key = ("--url", url_of(stateless)), ("--key", "other")
        table: list[tuple[tuple[str, ...], str]] = [
            (("--url", "http://127.0.0.1:9", "--patience", "0"), "no response for 0 s: Connection refused"),
            (("--url", "nowhere"), "is not the URL of a service"),
            (("--url", "http://nowhere.invalid", "--patience", "0"), "no response for 0 s"),
            (url, "/v1/model answered 401: a key is needed"),
            ((*url, "--key", "wrong"), "answered 401: this API key is not configured; set one with --key KEY"),
            ((*url, *key), "/v1/cycles answered 501"),
            (("--url", url_of(stateless) + "/v2", *key), "answered 404"),
            ((*url, *key, "--fleet", str(wrong)), "no column 'op_setting_1'"),
            ((*url, *key, "--fleet", str(wrong), "--drift", "wear:x2"), "not possible for recorded flights"),
        ]
        for flags, why in table:
            assert 1 == cli.main(["replay", *flags])
            said = capsys.readouterr().err
            assert why in said
            assert 1 == len(said.splitlines())
        monkeypatch.setenv("ENGINE_HEALTH_API_KEYS", "secret,other")  # as `serve` has them
        assert 1 == cli.main(["replay", *url])
        assert "501" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--speed", "fast"],
        ["--speed", "0"],
        ["--engines", "0"],
        ["--count", "-1"],
        ["--drift", "sensor_1:+2sd"],
        ["--drift", "nonsense"],
        ["--seed", "x"],
        ["--patience", "never"],
        ["--fleet", "no-such-file"],
        ["--fleet", __file__, "--endless"],
    ],
)
def test_wrong_usage_is_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is no value of a flag is refused before anything is sent."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", *flags])
    assert 2 == ended.value.code
    assert "Traceback" not in capsys.readouterr().err


def test_interrupting_is_no_failure(kept: Service) -> None:
    """Ctrl-C and SIGTERM end a replay with a summary, exit code 0 and no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        replay = start("replay", "--url", url_of(kept), "--seed", f"16{number:d}", "--speed", "50/s")
        until(partial(known, kept, f"sim16{number:d}-0"))
        replay.send_signal(number)
        said, failed = replay.communicate(timeout=30)
        assert 0 == replay.returncode, failed
        assert "engines (" in said
        assert "" == failed


def test_the_live_table_shows_the_worst_first() -> None:
    """On a terminal the fleet is a table, worst engine first, health in words, and what is planted below."""
    state = ReplayState("http://here", drifts=((0, "sensor_11:+2sd"),))
    console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True, color_system=None)
    table = TableDisplay(state, console)  # when nothing is known yet
    state.classes, state.flights, state.live_flights = ("normal", "degrading", "critical"), 7, 7
    for name, p in (("calm", 0.1), ("grave", 0.9), ("ill", 0.5)):
        found = {"normal": (1 - p) / 2, "degrading": (1 - p) / 2, "critical": p}
        state.latest[name] = {"engine_id": name, "cycle": 3, "health": "critical", "probabilities": found, "rul": 12.4}
    console.print(table.render())
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the text buffer given above
    assert sorted(("calm", "grave", "ill"), key=text.index) == ["grave", "ill", "calm"]
    assert "0.900" in text
    assert "7 flights; 3 engines" in text
    assert "sensor_11:+2sd" in text


@contextmanager
def begun_demo(folder: Path, *flags: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A demo that runs in a folder, and the port of its service; it is gone afterwards."""
    port = free_port()
    demo = subprocess.Popen(
        [sys.executable, "-m", "service.replay.demo", *flags],
        env=os.environ | {"ENGINE_HEALTH_PORT": str(port), "PYTHONPATH": os.getcwd()} | environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield demo, port
    finally:
        demo.terminate()  # it takes its service with it; killed, it would leave one, which would be waited for
        demo.communicate(timeout=30)


def test_the_demo_is_one_command(tmp_path: Path) -> None:
    """The demo starts a service and its fleet, prints the console's address, and Ctrl-C ends both."""
    with begun_demo(tmp_path, "--past", "1", "--engines", "3") as (demo, port):
        address = f"http://127.0.0.1:{port}"
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith(f"The console is at {address}/")
        until(lambda: json.loads(_get(f"{address}/v1/engines"))["total"] == 4)
        assert (tmp_path / "build" / "demo.db").exists()
        demo.send_signal(signal.SIGINT)
        _, failed = demo.communicate(timeout=30)
        assert (0, "") == (demo.returncode, failed)
        with pytest.raises(OSError, match="refused"):
            _get(f"{address}/livez")


def test_a_closed_terminal_ends_the_demo(tmp_path: Path) -> None:
    """A terminal that is closed leaves no service behind; and the demo finds its own service past any proxy."""
    proxy = "http://127.0.0.1:9"  # where nobody listens
    with begun_demo(tmp_path, "--past", "0", "--engines", "1", http_proxy=proxy, no_proxy="") as (demo, port):
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("The console is at")
        demo.send_signal(signal.SIGHUP)
        _, failed = demo.communicate(timeout=30)
        assert (0, "") == (demo.returncode, failed)
        with socket.socket() as probe:
            assert 0 != probe.connect_ex(("127.0.0.1", port))


def test_a_demo_disturbs_no_other_service(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where something listens already, the demo says so in one line, starts nothing and sends nothing."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("ENGINE_HEALTH_PORT", str(port))
        assert 1 == demo_main([])
    assert capsys.readouterr().err.startswith(f"demo: port {port} is in use")
    assert [] == list(tmp_path.iterdir())


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
    return content


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://a..b", ""),
        ("http://127.0.0.1:1/a b", ""),
        ("http://127.0.0.1:1/\xe9", ""),
        ("http://127.0.0.1:1", "a\nb"),
        ("http://127.0.0.1:1", "\u2192"),
    ],
)
def test_an_address_or_a_key_that_no_call_can_have_is_one_line(url: str, key: str) -> None:
    """What cannot stand in a request is refused at once, and not tried again for a minute."""
    with pytest.raises(CallFailed, match=r"is not the URL of a service|expected printable ASCII"):
        RetryingClient(url, key, 60.0)


def test_a_negative_rul_is_no_end(tmp_path: Path) -> None:
    """An engine cannot have failed before its last flight: the line is named, and nothing is sent."""
    path = tmp_path / "a.csv"
    path.write_text(",".join(["rul", *CHANNELS]) + "\n" + ",".join(["-3", *["1"] * len(CHANNELS)]) + "\n")
    with pytest.raises(DataError, match="line 2: rul: expected at least 0, got -3"):
        telemetry.read_histories(str(path), CHANNELS)
