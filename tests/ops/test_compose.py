"""The compose file, as far as it can be judged without running it; `tests/container.sh` runs it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OPS = ROOT / "ops"
each_service = pytest.mark.parametrize("name", SERVICES)


def read(path: str) -> Any:
    """Return the content of a file of ops."""
    return yaml.safe_load((OPS / path).read_text())


@each_service
def test_every_container_is_hardened(name: str) -> None:
    """Read-only root, no capability, no new privileges, a limit of memory and processes, started again when it ends."""
    one = SERVICES[name]
    assert (True, ["ALL"]) == (one["read_only"], one["cap_drop"])
    assert ["no-new-privileges:true"] == one["security_opt"]
    assert re.fullmatch(r"\d+[mg]", one["mem_limit"])
    assert one["pids_limit"] >= 1000  # a machine of 128 cores has some threads of ONNX Runtime and numpy for each
    assert "unless-stopped" == one["restart"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(one)


@each_service
def test_every_version_is_pinned(name: str) -> None:
    """An image has a full version, and ours the package's."""
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-alpine)?", tag)
    if "build" in SERVICES[name]:
        assert "engine-health" == image
        assert f'version = "{tag}"' in (ROOT / "pyproject.toml").read_text()


@each_service
def test_ports_are_this_machines_alone(name: str) -> None:
    """Nothing is published but on 127.0.0.1, and the database and the fleet not at all."""
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert (name in ("postgres", "replay")) == (not ports)


@each_service
def test_health_is_asked_of_whoever_listens(name: str) -> None:
    """Each service has a health check or that of its image, except the fleet, which has no port."""
    check: dict[str, Any] = SERVICES[name].get("healthcheck", {})
    if name == "engine-health":
        assert not check
        assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    else:
        assert check == {"disable": True} if name == "replay" else check["test"][0] == "CMD"


@each_service
def test_named_files_and_volumes_exist(name: str) -> None:
    """Every mounted file exists, every volume and secret is declared, every dependency is a service."""
    one = SERVICES[name]
    for volume in one.get("volumes", []):
        source = volume.split(":")[0]
        assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"]
        assert volume.endswith(":ro") == source.startswith("./")
    assert set(one.get("secrets", [])) <= set(COMPOSE["secrets"])
    assert set(one.get("depends_on", [])) <= set(SERVICES)
    for key in one.get("environment", {}):
        assert not key.startswith(PREFIX) or key.removeprefix(PREFIX).lower() in Settings.model_fields


def test_secrets_are_files_and_named_as_the_service_reads_them() -> None:
    """Each secret is a file that .env names, an empty one by default; no key and no password is a variable."""
    for name, secret in COMPOSE["secrets"].items():
        found = re.fullmatch(r"\$\{(\w+_FILE):-\./ops/compose/none\}", secret["file"])
        assert found
        assert name.removeprefix("engine_health_").upper() + "_FILE" == found[1]
        if name.startswith("engine_health_"):
            assert name.removeprefix("engine_health_") in Settings.model_fields
        else:  # of another program, which gets its path as an argument
            assert f"/run/secrets/{name}" in TEXT + (OPS / "alertmanager.yml").read_text()
    assert "" == (OPS / "compose" / "none").read_text()
    for one in SERVICES.values():
        secret = [key for key in one.get("environment", {}) if re.search("KEY|PASSWORD|DATABASE_URL|SECRET|TOKEN", key)]
        assert set(secret) <= {"POSTGRES_PASSWORD_FILE"}


def test_example_names_every_variable_and_no_other() -> None:
    """.env.example lists each variable of the compose file with its default, commented out."""
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"#?[A-Z_]+=", line)]
    assert all(line.startswith("#") for line in lines)
    said = dict(line[1:].split("=", 1) for line in lines)
    assert {"COMPOSE_PROFILES"} == set(said) - set(used)
    assert not set(used) - set(said)
    assert {name: value for name, value in used.items() if not name.endswith("_FILE")} == {
        name: value for name, value in said.items() if name in used and not name.endswith("_FILE")
    }


def test_example_states_memory_limit_of_compose() -> None:
    """The memory limit in the comment of .env.example is the one that docker-compose.yml sets."""
    (stated,) = re.findall(r"limit of\n?#? ?([\d.]+) GiB", (ROOT / ".env.example").read_text())
    limit = SERVICES["engine-health"]["mem_limit"]
    assert limit.endswith("m")
    assert float(stated) * 1024 == int(limit[:-1])


def test_prometheus_and_grafana_are_those_of_ops() -> None:
    """The files of ops/compose differ from those of ops in addresses and in naming an Alertmanager, no more."""
    alone, composed = read("prometheus.yml"), read("compose/prometheus.yml")
    assert ["alertmanager:9093"] == composed.pop("alerting")["alertmanagers"][0]["static_configs"][0]["targets"]
    assert ["engine-health:8000"] == composed["scrape_configs"][0]["static_configs"][0].pop("targets")
    del alone["scrape_configs"][0]["static_configs"][0]["targets"]
    assert alone == composed
    source, other = read("grafana/provisioning/datasources/prometheus.yml"), read("compose/datasource.yml")
    assert "http://prometheus:9090" == other["datasources"][0].pop("url")
    del source["datasources"][0]["url"]
    assert source == other


def test_grafana_finds_its_dashboard_and_keeps_no_password() -> None:
    """The dashboard is mounted where provisioning looks, its data source is provisioned, and login is disabled."""
    grafana = SERVICES["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    folder = read("grafana/provisioning/dashboards/engine-health.yml")["providers"][0]["options"]["path"]
    assert mounted["./ops/grafana/engine-health.json"] == f"{folder}/engine-health.json"
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/engine-health.json"
    uid = read("compose/datasource.yml")["datasources"][0]["uid"]
    panels = json.loads((OPS / "grafana" / "engine-health.json").read_text())["panels"]
    assert {uid} == {panel["datasource"]["uid"] for panel in panels if "datasource" in panel}
    assert ("true", "Viewer") == tuple(
        grafana["environment"][f"GF_AUTH_ANONYMOUS_{key}"] for key in ("ENABLED", "ORG_ROLE")
    )
    assert "true" == grafana["environment"]["GF_AUTH_DISABLE_LOGIN_FORM"]


@pytest.mark.usefixtures("programs")
def test_prometheus_accepts_what_is_mounted(tmp_path: Path) -> None:
    """Promtool accepts the configuration with the rules in the folder of the container."""
    for volume in SERVICES["prometheus"]["volumes"]:
        source, target = volume.split(":")[:2]
        if source.startswith("./"):
            shutil.copy(ROOT / source, tmp_path / Path(target).name)
    done = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert 0 == done.returncode, done.stdout + done.stderr


def test_alerts_reach_a_receiver_that_exists() -> None:
    """The Alertmanager's route ends at one of its receivers, and alerts are held back by one that exists."""
    config = read("alertmanager.yml")
    assert config["route"]["receiver"] in {one["name"] for one in config["receivers"]}
    alerts = set(re.findall(r"- alert: (\w+)", (OPS / "alerts.yml").read_text()))
    named = re.findall(r"alertname !?= (\w+)", (OPS / "alertmanager.yml").read_text())
    assert named
    assert set(named) <= alerts
