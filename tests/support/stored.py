"""Calls of the store for tests."""

from typing import Any

from model.contract import Manifest
from model.windows import Readings
from tests.support.processes import Service


def fly(service: Service, engine_id: str, cycle: int, row: Readings, status: int = 200) -> dict[str, Any]:
    """Send one flight, check the status, and return the response."""
    flight = {"engine_id": engine_id, "cycle": cycle, "telemetry": row.tolist()}
    response = service.client.post("/v1/cycles", json={"cycles": [flight]})
    assert status == response.status_code, response.text
    content: dict[str, Any] = response.json()
    return content


def submit_labels(service: Service, *rows: dict[str, Any], status: int = 200, **rest: Any) -> list[str]:
    """Submit labels, check the status, and return the result of each."""
    response = service.client.post("/v1/labels", json={"labels": list(rows), **rest})
    assert status == response.status_code, response.text
    return [row["result"] for row in response.json()["results"]]


def history(service: Service, engine_id: str) -> list[dict[str, Any]]:
    """Return the history of an engine, oldest first."""
    content: list[dict[str, Any]] = service.client.get(f"/v1/engines/{engine_id}").json()["history"]
    return content


def engines(service: Service, **query: Any) -> list[dict[str, Any]]:
    """Return a page of engines, worst first."""
    content: list[dict[str, Any]] = service.client.get("/v1/engines", params=query).json()["engines"]
    return content


CLASSES = 3
MANIFEST = Manifest(
    name="tested", version="1", classes=("normal", "degrading", "critical"), rul_thresholds=(125.0, 50.0)
)
