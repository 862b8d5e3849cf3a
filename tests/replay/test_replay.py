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
    """Return the base URL of a service."""
    return str(service.client.base_url).rstrip("/")


def run_replay(service: Service, *flags: str) -> int:
    """Replay a fleet to a service as fast as possible. Return the exit code."""
    return cli.main(["replay", "--url", url_of(service), *FAST, *flags])


def has_engine(service: Service, engine_id: str) -> bool:
    """Return whether a service has stored flights of an engine."""
    return service.client.get(f"/v1/engines/{engine_id}").status_code == 200


def history(service: Service, engine_id: str) -> list[dict[str, Any]]:
    """Return the stored history of an engine, oldest flight first."""
    result: list[dict[str, Any]] = service.client.get(f"/v1/engines/{engine_id}").json()["history"]
    return result


@pytest.fixture(scope="module")
def shared_service() -> Iterator[Service]:
    """One service and one store for replays that do not affect each other. Each uses a different seed."""
    with running() as result:
        yield result


def test_replay_runs_until_all_engines_failed(shared_service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flight is predicted, and each failure labels its engine. A repeated replay changes nothing."""
    for _ in range(2):
        assert 0 == run_replay(shared_service, "--engines", "2", "--seed", "11")
        output = capsys.readouterr().out
        assert "2 failures sent" in output
        assert "conflict" not in output
    for number in range(2):
        life = int(simulate.SimulatedEngine(number, 11, mixed=True).remaining)
        result = history(shared_service, f"sim11-{number}")
        assert list(range(1, life + 1)) == [row["cycle"] for row in result]
        assert ["critical"] * 51 == [row["label"] for row in result[-51:]]
        assert all(row["label"] is not None for row in result)


def test_repeated_replay_waits_only_for_new_flights(shared_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated replay sends flights that are stored without waiting, and waits only for new ones."""
    fleet = ("--engines", "3", "--seed", "23", "--past", "2")
    assert 0 == run_replay(shared_service, *fleet, "--count", "60")
    waits: list[float] = []
    monkeypatch.setattr(LogDisplay, "wait", lambda _, seconds: waits.append(seconds))
    assert 0 == run_replay(shared_service, *fleet, "--count", "64", "--speed", "2/min")
    assert 3 == sum(seconds > 0 for seconds in waits)  # 64 - 60 new flights; the first of them is sent without waiting
    flown = list(limit_flights(simulated_flights(3, 23, DriftInjector(), endless=False, retired=2), 64))
    assert len(flown) == sum(len(history(shared_service, engine)) for engine in {flight.engine_id for flight in flown})


def test_count_limits_flights_and_sends_no_failure(shared_service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """`--count` stops after this number of flights. No failure is sent for engines that still fly."""
    assert 0 == run_replay(shared_service, "--engines", "5", "--seed", "12", "--count", "23")
    assert "23 flights; 5 engines" in capsys.readouterr().out
    assert [5, 5, 5, 4, 4] == [len(history(shared_service, f"sim12-{number}")) for number in range(5)]


def test_recorded_flights_and_failures_are_sent(shared_service: Service, tmp_path: Path) -> None:
    """C-MAPSS text and CSV are sent unchanged. A failure is sent only where the file has RUL."""
    engines = list(simulate.simulate_histories(2, seed=13))
    named = tmp_path / "train_FD009.txt"
    named.write_text(as_text(engines))
    assert 0 == run_replay(shared_service, "--fleet", str(named))
    table = tmp_path / "table.csv"
    table.write_text(as_csv(engines))
    assert 0 == run_replay(shared_service, "--fleet", str(table), "--engines", "1")
    result = history(shared_service, "FD009-2")
    assert len(engines[1].cycle) == len(result)
    assert "critical" == result[-1]["label"]
    assert [None] == [row["label"] for row in history(shared_service, "sim13-0")[-1:]]
    assert 404 == shared_service.client.get("/v1/engines/sim13-1").status_code


class UnreliableProxy(ThreadingHTTPServer):
    """Proxy of a service that regularly returns 429 or 503, closes before the call, or loses the response."""

    daemon_threads = True

    def __init__(self, service: str) -> None:
        super().__init__(("127.0.0.1", 0), _Broken)
        self.service, self.calls = service, 0


class _Broken(BaseHTTPRequestHandler):
    server: UnreliableProxy
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
            self.close_connection = True  # before the call is forwarded
        else:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self.server.service + self.path, body, headers)
            with urllib.request.urlopen(request) as response:
                text = response.read()
            if turn == 7:
                self.close_connection = True  # the call succeeded, and its response is lost
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


def test_unreliable_service_gets_each_flight_once(shared_service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind a proxy that fails often, every flight is stored once and unchanged."""
    with serving(UnreliableProxy(url_of(shared_service))) as url:
        assert 0 == cli.main(["replay", "--url", url, *FAST, "--engines", "3", "--seed", "14", "--count", "2000"])
    assert "calls retried" in capsys.readouterr().out
    for number in range(3):
        rows = simulate.SimulatedEngine(number, 14, mixed=True).fly(1000)
        result = history(shared_service, f"sim14-{number}")
        assert len(rows) == len(result)
        instances = [{"telemetry": rows[max(0, k - 100) : k].tolist()} for k in (1, 50, len(rows))]
        expected = [row["logits"] for row in shared_service.predict(instances)["predictions"]]
        assert expected == [result[k - 1]["logits"] for k in (1, 50, len(rows))]


def test_replay_continues_after_service_restart(tmp_path: Path) -> None:
    """A replay continues after the service is killed and restarted on the same store. No flight is lost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    store = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/store.db"}
    replay = start(
        "replay", "--url", f"http://127.0.0.1:{port}", "--speed", "400/s", "--engines", "3", "--count", "600"
    )
    services = [start("serve", "--port", port, **store)]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            def count_stored_flights() -> int:
                try:
                    return len(client.get("/v1/engines/sim0-0").json().get("history", []))
                except httpx.TransportError:
                    return 0

            wait_until(lambda: count_stored_flights() > 20)
            services[0].kill()
            services[0].communicate()
            services.append(start("serve", "--port", port, **store))
            output, errors = replay.communicate(timeout=60)
            assert 0 == replay.returncode, errors
            assert "waiting for" in output
            assert 200 == count_stored_flights()
    finally:
        for process in (*services, replay):
            process.kill()
            process.communicate()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until a condition is true, at most 1 minute."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_conflicts_are_counted_and_exit_with_1(shared_service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Flights that differ from stored ones are counted, the others are sent, and the exit code is 1."""
    flags = ("--engines", "2", "--seed", "15", "--count", "40")
    assert 0 == run_replay(shared_service, *flags)
    before = history(shared_service, "sim15-1")
    capsys.readouterr()
    assert 1 == run_replay(shared_service, *flags, "--drift", "sensor_11:+2sd@30")
    output = capsys.readouterr()
    assert "40 flights; 2 engines" in output.out
    assert "engine-health: 10 conflicts with stored flights, the first: engine sim15-0, cycle 16\n" == output.err
    assert before == history(shared_service, "sim15-1")


def test_injected_drift_is_measured_without_labels() -> None:
    """The biased sensor has the largest rise of drift in the service, without any label."""
    psi = []
    with running() as service:
        for flags in (("--seed", "1"), ("--seed", "2", "--drift", "sensor_11:+2sd")):
            assert 0 == run_replay(service, "--engines", "30", "--count", "1500", *flags)
            calibration = service.client.get("/v1/calibration").json()
            assert 0 == calibration["n"]
            psi.append({name: channel["psi"] for name, channel in calibration["drift"]["channels"].items()})
    rise = {name: psi[1][name] - psi[0][name] for name in CHANNELS}
    assert "sensor_11" == max(rise, key=rise.__getitem__)
    assert rise["sensor_11"] > 0.1


def test_past_sends_failed_engines_first() -> None:
    """With `--past`, engines that failed before come first, then engines of any age. Past flights are not delayed."""
    fleet = list(limit_flights(simulated_flights(4, 0, DriftInjector(), endless=True, retired=2), 400))
    past = [flight for flight in fleet if flight.past]
    assert fleet[: len(past)] == past
    assert ["sim0-0", "sim0-1"] == [flight.engine_id for flight in past if flight.failed_at is not None]
    ages = [sum(flight.engine_id == f"sim0-{k}" for flight in past) for k in range(2, 6)]
    assert 4 == len(set(ages))
    assert 400 == len(fleet) - len(past)
    failed = sum(flight.failed_at is not None for flight in fleet) - 2
    assert 4 + failed == len({flight.engine_id for flight in fleet if not flight.past})


def test_failed_replay_exits_with_1_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service, key, store, URL or file that is absent or invalid gives exit code 1 and one line that names it."""
    invalid = tmp_path / "wrong.csv"
    invalid.write_text("engine_id,cycle\n")
    with running(ENGINE_HEALTH_DATABASE_URL="", ENGINE_HEALTH_API_KEYS="secret,other") as stateless:
        url, key = ("--url", url_of(stateless)), ("--key", "other")
        table: list[tuple[tuple[str, ...], str]] = [
            (("--url", "http://127.0.0.1:9", "--patience", "0"), "no response for 0 s: Connection refused"),
            (("--url", "nowhere"), "is not the URL of a service"),
            (("--url", "http://nowhere.invalid", "--patience", "0"), "no response for 0 s"),
            (url, "/v1/model returned 401: "),
            ((*url, "--key", "wrong"), "; set one with --key KEY"),
            ((*url, *key), "/v1/cycles returned 501"),
            (("--url", url_of(stateless) + "/v2", *key), "returned 404"),
            ((*url, *key, "--fleet", str(invalid)), "no column 'op_setting_1'"),
            ((*url, *key, "--fleet", str(invalid), "--drift", "wear:x2"), "not possible for recorded flights"),
        ]
        for flags, message in table:
            assert 1 == cli.main(["replay", *flags])
            output = capsys.readouterr().err
            assert message in output
            assert 1 == len(output.splitlines())
        monkeypatch.setenv("ENGINE_HEALTH_API_KEYS", "secret,other")  # as for `serve`
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
def test_wrong_usage_exits_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An invalid value of a flag exits with 2 before any call."""
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["replay", *flags])
    assert 2 == exit_code.value.code
    assert "Traceback" not in capsys.readouterr().err


def test_interrupted_replay_exits_with_0(shared_service: Service) -> None:
    """Ctrl-C and SIGTERM end a replay with a summary and a hint to continue, exit code 0 and no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        replay = start("replay", "--url", url_of(shared_service), "--seed", f"16{number:d}", "--speed", "50/s")
        wait_until(partial(has_engine, shared_service, f"sim16{number:d}-0"))
        replay.send_signal(number)
        output, errors = replay.communicate(timeout=30)
        assert 0 == replay.returncode, errors
        assert "stopped; run the same command to continue" in output
        assert "engines (" in output
        assert "" == errors


def test_live_table_shows_worst_engine_first() -> None:
    """On a terminal the fleet is a table, worst engine first, with the class in words and injected drift below."""
    state = ReplayState("http://here", drifts=((0, "sensor_11:+2sd"),))
    console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True, color_system=None)
    table = TableDisplay(state, console)  # before the first prediction
    state.classes, state.flights, state.live_flights = ("normal", "degrading", "critical"), 7, 7
    for name, p in (("calm", 0.1), ("grave", 0.9), ("ill", 0.5)):
        probabilities = {"normal": (1 - p) / 2, "degrading": (1 - p) / 2, "critical": p}
        prediction = {"engine_id": name, "cycle": 3, "health": "critical", "probabilities": probabilities, "rul": 12.4}
        state.latest[name] = prediction
    console.print(table.render())
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the text buffer from above
    assert sorted(("calm", "grave", "ill"), key=text.index) == ["grave", "ill", "calm"]
    assert "0.900" in text
    assert "7 flights; 3 engines" in text
    assert "sensor_11:+2sd" in text


@contextmanager
def running_demo(folder: Path, *flags: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Run a demo in a folder. Yield it and the port of its service, and stop it afterwards."""
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
        demo.terminate()  # it stops its service; a killed demo would leave the service running
        demo.communicate(timeout=30)


def test_demo_starts_service_and_fleet(tmp_path: Path) -> None:
    """The demo starts service and fleet, prints the URL of the console, and Ctrl-C stops both. The hint fits a demo."""
    with running_demo(tmp_path, "--past", "1", "--engines", "3") as (demo, port):
        address = f"http://127.0.0.1:{port}"
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith(f"The console is at {address}/")
        wait_until(lambda: json.loads(_get(f"{address}/v1/engines"))["total"] == 4)
        assert (tmp_path / "build" / "demo.db").exists()
        demo.send_signal(signal.SIGINT)
        output, errors = demo.communicate(timeout=30)
        assert (0, "") == (demo.returncode, errors)
        assert "stopped; the next demo starts with an empty store" in output
        assert "same command" not in output
        with pytest.raises(OSError, match="refused"):
            _get(f"{address}/livez")


def test_closed_terminal_stops_the_demo(tmp_path: Path) -> None:
    """A closed terminal stops demo and service. The demo connects to its service without a proxy."""
    proxy = "http://127.0.0.1:9"  # no program listens there
    with running_demo(tmp_path, "--past", "0", "--engines", "1", http_proxy=proxy, no_proxy="") as (demo, port):
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("The console is at")
        demo.send_signal(signal.SIGHUP)
        _, errors = demo.communicate(timeout=30)
        assert (0, "") == (demo.returncode, errors)
        with socket.socket() as probe:
            assert 0 != probe.connect_ex(("127.0.0.1", port))


def test_demo_rejects_a_used_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the port is in use, the demo reports it in one line, starts nothing and sends nothing."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("ENGINE_HEALTH_PORT", str(port))
        assert 1 == demo_main([])
    assert capsys.readouterr().err.startswith(f"demo: port {port} is in use")
    assert [] == list(tmp_path.iterdir())


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        content: bytes = response.read()
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
def test_invalid_url_or_key_is_rejected_immediately(url: str, key: str) -> None:
    """A URL or key that cannot be part of a request is rejected without retries."""
    with pytest.raises(CallFailed, match=r"is not the URL of a service|expected printable ASCII"):
        RetryingClient(url, key, 60.0)


def test_negative_rul_is_rejected(tmp_path: Path) -> None:
    """A negative RUL is rejected with its line, and nothing is sent."""
    path = tmp_path / "a.csv"
    path.write_text(",".join(["rul", *CHANNELS]) + "\n" + ",".join(["-3", *["1"] * len(CHANNELS)]) + "\n")
    with pytest.raises(DataError, match="line 2: rul: expected at least 0, got -3"):
        telemetry.read_histories(str(path), CHANNELS)
