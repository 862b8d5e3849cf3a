import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.load import free_port
from model.contract import Manifest
from model.numerics import Floats
from model.windows import Readings
from ops import dashboard
from service.calibration import statistics
from tests.support.models import identity_classifier
from tests.support.processes import Service, running, until

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"
NAME = re.compile(r"engine_health[\w:]*|\bup(?=\{)")
SOON = {"15s": "1s", "30s": "1s", "2m": "1s"}  # how often to scrape and to evaluate: here for seconds, not for months
TARGET = "127.0.0.1:8000"
LAST = ("engine_health:accuracy_noise:stddev", "engine_health:input_psi_noise:ratio1d", "engine_health:slow:ratio")


class Prometheus:
    """A running Prometheus; questions are asked of one moment, `at`, so that answers fit each other."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.at: float | None = None

    def get(self, path: str, **params: Any) -> Any:
        """Return the data of a successful response."""
        answer = self._client.get(f"/api/v1/{path}", params=params).json()
        assert "success" == answer["status"], answer
        return answer["data"]

    def ask(self, query: str) -> list[float]:
        """Return the values of an expression."""
        moment = {} if self.at is None else {"time": self.at}
        found = self.get("query", query=query, **moment)
        rows = [found["result"]] if found["resultType"] == "scalar" else [row["value"] for row in found["result"]]
        return [float(value) for _, value in rows]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, as Prometheus understood it."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def watching(service: Service, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration of ops and short intervals for this service."""
    for name in ("prometheus.yml", "rules.yml", "alerts.yml"):
        hurried = re.sub(r"interval: (\w+)", lambda found: f"interval: {SOON[found[1]]}", (OPS / name).read_text())
        (folder / name).write_text(hurried.replace(TARGET, service.client.base_url.netloc.decode()))
    here = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={here}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{here}", timeout=60, trust_env=False) as client:
            found = Prometheus(client)
            until(lambda: found.ready() or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text()
            yield found
    finally:
        process.kill()
        process.wait()


@dataclass
class Truth:
    """What was answered and what was true, a row for each label: (N, C), (N, C), and whether the set held it (N,)."""

    logits: Floats
    labels: Floats
    covered: Floats


def scraped(prometheus: Prometheus, labelled: int) -> None:
    """Wait until a scrape has this number of labelled predictions."""
    until(lambda: prometheus.ask("engine_health_labelled_total") == [labelled])


def traffic(service: Service, prometheus: Prometheus, windows: Readings, manifest: Manifest) -> Truth:
    """Predictions with labels, and flights that are labelled later; every round is scraped before the next.

    All but some that no truth can reach are of engines, so that the memory keeps what the counters count.
    """
    random = np.random.default_rng(5)
    rows, labels = [], []
    for turn in range(3):
        scaled = windows[random.integers(0, 4, 40)] * random.normal(1, 0.002, (40, 1, 17))
        said = [int(k) for k in random.integers(0, 3, 39)] + [[0.2, 0.5, 0.3]]
        asked = [
            {"telemetry": w.tolist(), "label": label, "engine_id": f"{turn}-{k}", "cycle": 1}
            for k, (w, label) in enumerate(zip(scaled, said, strict=True))
        ]
        unlabelled = {"telemetry": windows[0].tolist(), "engine_id": "d", "cycle": turn}
        anonymous = [{"telemetry": windows[0].tolist()}] * 50  # more than there are of engines
        rows += service.predict([*asked, unlabelled, *anonymous])["predictions"][:40]
        labels += said
        scraped(prometheus, len(labels))
    flights = [
        {"engine_id": engine, "cycle": cycle, "telemetry": windows[k][cycle].tolist()}
        for k, engine in enumerate(("a", "b", "c"))
        for cycle in range(0, 100, 4)
    ]
    rows += service.client.post("/v1/cycles", json={"cycles": flights}).json()["predictions"]
    late = [int(k) for k in random.integers(0, 3, len(flights))]
    told = [{key: f[key] for key in ("engine_id", "cycle")} | {"label": k} for f, k in zip(flights, late, strict=True)]
    results = service.client.post("/v1/labels", json={"labels": told}).json()["results"]
    assert {"joined"} == {row["result"] for row in results}
    truths = np.array([np.eye(3)[one] if isinstance(one, int) else one for one in labels + late])
    sets = np.array([[name in row["prediction_set"] for name in manifest.classes] for row in rows])
    logits = np.array([row["logits"] for row in rows], dtype=np.float32)
    return Truth(logits.astype(np.float64), truths, (truths * sets).sum(axis=1))


@dataclass
class Watched:
    """A service of two workers, the Prometheus that watched it, and the truth."""

    service: Service
    prometheus: Prometheus
    truth: Truth


@pytest.fixture(scope="module")
def watched(
    programs: None,  # noqa: ARG001  # asked for, so that a test skips before anything starts
    windows: Readings,
    manifest: Manifest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    """Traffic seen from its first request to its last, and rules that have evaluated all of it."""
    folder = tmp_path_factory.mktemp("prometheus")
    with running(ENGINE_HEALTH_WORKERS="2") as service, watching(service, folder) as prometheus:
        scraped(prometheus, 0)
        truth = traffic(service, prometheus, windows, manifest)
        scraped(prometheus, len(truth.logits))
        seen = time.time() + 1  # a group that begins from then on has seen the same
        until(lambda: all(prometheus.ask(f"min(timestamp({name}))") > [seen] for name in LAST))
        prometheus.at = time.time()
        yield Watched(service, prometheus, truth)


def recorded(prometheus: Prometheus, name: str, window: str) -> float:
    """Return the single value that a rule recorded."""
    (found,) = prometheus.ask(f'engine_health:{name}{{window="{window}"}}')
    return found


@pytest.mark.parametrize("window", ["1h", "1d", "30d"])
def test_recorded_figures_equal_an_offline_computation(watched: Watched, manifest: Manifest, window: str) -> None:
    """Accuracy, losses, Brier, coverage, ECE, z and the noise of chance equal an offline computation to 1e-9."""
    truth, n = watched.truth, len(watched.truth.logits)
    log_p = truth.logits / manifest.temperature
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p, q = np.exp(log_p), truth.labels
    loss, entropy = -(q * log_p).sum(axis=1), -(p * log_p).sum(axis=1)
    variance = (p * log_p**2).sum(axis=1) - entropy**2
    top, hits = p.max(axis=1), q[np.arange(n), p.argmax(axis=1)]
    bins = [np.ceil(top * 15) == k for k in range(1, 16)]
    coins = sum(top[b].sum() * (1 - top[b].mean()) for b in bins if b.any())
    gaps = [np.sqrt(2 / np.pi * top[b].sum() * (1 - top[b].mean())) for b in bins if b.any()]
    stretched = recorded(watched.prometheus, "labelled:increase", window) / n  # to the edge of the window
    expected = {
        "accuracy:ratio": hits.mean(),
        "confidence:mean": top.mean(),
        "cross_entropy:mean": loss.mean(),
        "expected_cross_entropy:mean": entropy.mean(),
        "brier:mean": ((p - q) ** 2).sum(axis=1).mean(),
        "conformal_coverage:ratio": truth.covered.mean(),
        "labelled_per_prediction:ratio": n / (n + 3),
        "ece:ratio": sum(abs((top[b] - hits[b]).sum()) for b in bins) / n,
        "loss_gap:z": (loss - entropy).sum() / np.sqrt(variance.sum()) * np.sqrt(stretched),
        "ece_noise:ratio": sum(gaps) / n / np.sqrt(stretched),
        "accuracy_noise:stddev": np.sqrt(coins) / n / np.sqrt(stretched),
    }
    assert 1 <= stretched < 2
    assert expected == pytest.approx({name: recorded(watched.prometheus, name, window) for name in expected}, rel=1e-9)


@pytest.mark.parametrize("window", ["1h", "1d", "30d"])
def test_recorded_figures_equal_the_calibration_report(watched: Watched, window: str) -> None:
    """Recorded figures equal those of GET /v1/calibration for the same predictions, to 1e-9."""
    answer = watched.service.client.get("/v1/calibration", params={"window": window})
    assert 200 == answer.status_code, answer.text
    said, n = answer.json(), len(watched.truth.logits)
    assert n == said["n"]
    stretched = recorded(watched.prometheus, "labelled:increase", window) / n  # to the edge of the window
    expected = {
        "accuracy:ratio": said["accuracy"],
        "confidence:mean": said["accuracy"] + said["label_free"]["error"]["accuracy"],
        "cross_entropy:mean": said["cross_entropy"]["realised"],
        "expected_cross_entropy:mean": said["cross_entropy"]["expected"],
        "brier:mean": said["brier"],
        "conformal_coverage:ratio": said["conformal"]["coverage"],
        "labelled_per_prediction:ratio": said["labels"]["share"],
        "ece:ratio": said["ece"]["value"],
        "loss_gap:z": said["cross_entropy"]["z"] * math.sqrt(stretched),
    }
    assert expected == pytest.approx({name: recorded(watched.prometheus, name, window) for name in expected}, rel=1e-9)
    for k, one in enumerate(said["reliability"]):
        chosen = f'{{bin="{k}",window="{window}"}}'
        rows = f"(engine_health:reliability_predictions:increase{chosen} > 0)"
        for name, key in (("confidence", "confidence"), ("correct", "accuracy")):
            values = watched.prometheus.ask(f"engine_health:reliability_{name}:increase{chosen} / {rows}")
            assert ([one[key]] if one["n"] else []) == pytest.approx(values, rel=1e-9), (k, name)


def test_few_labels_are_few_in_both(watched: Watched) -> None:
    """The share of labels below which alerts keep quiet is the one below which the service calls a selection biased."""
    (needed,) = watched.prometheus.ask("engine_health:threshold:representative_share")
    assert statistics.REPRESENTATIVE_SHARE == needed
    biased = watched.service.client.get("/v1/calibration").json()["labels"]["selection_biased"]
    assert biased is (recorded(watched.prometheus, "labelled_per_prediction:ratio", "30d") < needed)


def test_every_rule_returns_data(watched: Watched) -> None:
    """Each recording rule has a value, and each alert is valid and has a value of everything that it reads."""
    rules = watched.prometheus.rules()
    assert sum(path.read_text().count("expr:") for path in (OPS / "rules.yml", OPS / "alerts.yml")) == len(rules)
    for rule in rules:
        assert ("ok", "") == (rule["health"], rule.get("lastError", "")), rule
        reads = [rule["query"]] if rule["type"] == "recording" else NAME.findall(rule["query"])
        assert reads
        for query in reads:
            assert watched.prometheus.ask(query), query


@pytest.mark.parametrize("window", dashboard.WINDOWS)
def test_every_panel_returns_data(watched: Watched, window: str) -> None:
    """Each query of the dashboard has finite values, over each window that one may choose."""
    panels = json.loads(dashboard.TARGET.read_text())["panels"]
    queries = [target["expr"] for one in panels for target in one.get("targets", ())]
    assert len(queries) > 30
    for query in queries:
        values = watched.prometheus.ask(query.replace("$__rate_interval", "1m").replace("$window", window))
        assert values, query
        assert all(map(math.isfinite, values)), (query, values)


def test_every_alert_has_a_runbook_section(watched: Watched) -> None:
    """An alert waits, has a severity, a summary and a description, and leads to its section of the runbook."""
    headings = {line.removeprefix("## ") for line in (ROOT / "docs" / "runbook.md").read_text().splitlines()}
    alerts = [rule for rule in watched.prometheus.rules() if rule["type"] == "alerting"]
    assert len(alerts) >= 11
    for alert in alerts:
        assert alert["duration"] > 0
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert f"docs/runbook.md#{alert['name'].lower()}" == alert["annotations"]["runbook_url"]
        assert alert["name"] in headings
        assert {"summary", "description", "runbook_url"} == set(alert["annotations"])


def test_thresholds_are_named_once(watched: Watched) -> None:
    """Every number that an alert compares with is a threshold with a name, and every threshold is used."""
    rules = watched.prometheus.rules()
    alerts = " ".join(rule["query"] for rule in rules if rule["type"] == "alerting")
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", alerts)
    assert {"0", "0.5"} == set(re.findall(r"(?<![\w:.])\d+(?:\.\d+)?", bare))  # nothing, and a square root
    named = {rule["name"] for rule in rules if ":threshold:" in rule["name"]}
    assert named == {name for name in NAME.findall(alerts) if ":threshold:" in name}


@pytest.mark.usefixtures("programs")
def test_every_alert_is_tested_firing_and_silent() -> None:
    """Promtool finds rules and configuration sound, and each alert fires and keeps quiet where it should."""
    for command in ("check config prometheus.yml", "test rules alerts_test.yml", "test rules alerts_days_test.yml"):
        done = subprocess.run(["promtool", *command.split()], cwd=OPS, capture_output=True, text=True)
        assert 0 == done.returncode, done.stdout + done.stderr
    tried = "".join(path.read_text() for path in OPS.glob("*_test.yml"))
    for alert in re.findall(r"- alert: (\w+)", (OPS / "alerts.yml").read_text()):
        assert re.search(rf"alertname: {alert}\n +eval_time: \w+\n +exp_alerts:\n", tried), alert
        assert re.search(rf"alertname: {alert}, eval_time: \w+, exp_alerts: \[\]", tried), alert


def test_workers_show_what_one_process_shows(watched: Watched, service: Service) -> None:
    """Families, types, texts and series are the same for one process and for several workers."""

    def families(one: Service) -> set[str]:
        return {line for line in one.client.get("/metrics").text.splitlines() if line.startswith(("# TYPE", "# HELP"))}

    def series(one: Service) -> set[str]:  # those of requests are there from the first request of their kind on
        return {name for name in one.metrics() if not name.startswith("engine_health_http_")}

    assert families(service) == families(watched.service)
    assert series(service) == series(watched.service)


def test_without_a_conformal_rule_no_row_has_a_set(tmp_path: Path) -> None:
    """A model that gives no prediction sets adds labelled rows, and none of which coverage would be a share."""
    described: dict[str, object] = {"name": "plain", "version": "1", "classes": ["n", "e", "s", "w"]}
    with running(ENGINE_HEALTH_MODEL=str(identity_classifier(tmp_path / "plain.onnx", described))) as plain:
        plain.predict([{"telemetry": [1, 2, 3, 4], "label": "w"}])
        found = plain.metrics()
    assert (1, 0) == (found["engine_health_labelled_total"], found["engine_health_conformal_labelled_total"])


def test_metrics_are_named_as_prometheus_advises(watched: Watched) -> None:
    """The exported metrics pass promtool's lint."""
    exposition = watched.service.client.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True)
    assert (0, "") == (done.returncode, done.stdout + done.stderr)


def test_dashboard_is_what_its_script_writes() -> None:
    """The file that Grafana reads is the script's, its panels do not overlap, and its source is the provisioned one."""
    assert dashboard.text() == dashboard.TARGET.read_text()
    panels = json.loads(dashboard.text())["panels"]
    taken = [
        (x, y)
        for place in (one["gridPos"] for one in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert {x for x, _ in taken} == set(range(24))
    assert len({one["title"] for one in panels}) == len(panels)
    source = (OPS / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    assert f"uid: {dashboard.SOURCE['uid']} " in source
