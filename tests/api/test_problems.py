"""Error codes: a closed list, the same in the code, in docs/api.md, in the OpenAPI document and in every response."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from service import errors
from service.api.problems import HTTP_CODES, STATUS, TITLES, OriginRejected, problem
from service.app import create_app
from service.errors import Code
from service.metrics import Metrics
from service.settings import read_settings
from tests.support.processes import Service, running

ROOT = Path(__file__).parents[2]
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
JSON = {"Content-Type": "application/json"}
TEMPERATURE = "/v1/calibration/temperature"
READER, ADMIN = {"Authorization": "Bearer reader"}, {"Authorization": "Bearer admin"}
PREFLIGHT = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
Call = tuple[str, str, dict[str, str], bytes]
WITH_KEYS: dict[Code, Call] = {
    Code.MALFORMED_JSON: ("POST", "/v1/predict", READER | JSON, b"{"),
    Code.MALFORMED_ARROW: ("POST", "/v1/predict", READER | ARROW, b"no stream"),
    Code.ORIGIN_NOT_ALLOWED: ("OPTIONS", "/v1/predict", PREFLIGHT, b""),
    Code.API_KEY_MISSING: ("GET", "/v1/model", {}, b""),
    Code.API_KEY_UNKNOWN: ("GET", "/v1/model", {"X-API-Key": "other"}, b""),
    Code.NOT_ADMIN: ("PUT", TEMPERATURE, READER | JSON, b"{}"),
    Code.PATH_NOT_FOUND: ("GET", "/v1/nothing", READER, b""),
    Code.RECORD_NOT_FOUND: ("GET", "/v1/engines/unknown", READER, b""),
    Code.METHOD_NOT_ALLOWED: ("DELETE", "/v1/predict", READER, b""),
    Code.CONFLICT: ("PUT", TEMPERATURE, ADMIN | JSON, b'{"rollback": true}'),
    Code.BODY_TOO_LARGE: ("POST", "/v1/outcomes", READER | JSON, b" " * 2000),
    Code.UNSUPPORTED_MEDIA_TYPE: ("POST", "/v1/predict", READER | {"Content-Type": "text/csv"}, b"1"),
    Code.INVALID_VALUE: ("POST", "/v1/predict", READER | JSON, b'{"instances": 1}'),
}
WITHOUT_KEYS_AND_STORE: dict[Code, Call] = {
    Code.ADMIN_DISABLED: ("PUT", TEMPERATURE, JSON, b"{}"),
    Code.STORE_NOT_CONFIGURED: ("GET", "/v1/engines", {}, b""),
}
# Codes that no single request can cause on demand, with the error that has them.
IN_PROCESS: dict[Code, Exception] = {
    Code.MALFORMED_HTTP: HTTPException(400),
    Code.CLIENT_DISCONNECTED: errors.ClientDisconnected("gone"),
    Code.MODEL_NOT_FOUND: errors.UnknownModel("unknown model"),
    Code.REQUEST_TIMEOUT: errors.RequestTimeout("late"),
    Code.ARTEFACT_REJECTED: errors.ArtefactRejected("not a model"),
    Code.OVERLOADED: errors.Overloaded("full", 2.0),
    Code.HEADERS_TOO_LARGE: HTTPException(431),
    Code.INTERNAL_ERROR: ZeroDivisionError("a defect"),
    Code.STORE_UNAVAILABLE: errors.StoreUnavailable("locked"),
    Code.NOT_READY: errors.NotReady("no model"),
    Code.DRAINING: errors.Draining("shutting down"),
}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Service]:
    """A service with API keys, admin keys, an allowed origin and a small body limit."""
    keys = {"ENGINE_HEALTH_API_KEYS": "reader", "ENGINE_HEALTH_ADMIN_KEYS": "admin"}
    limits = {"ENGINE_HEALTH_CORS_ORIGINS": "https://here.example", "ENGINE_HEALTH_MAX_BODY_BYTES": "1000"}
    with running(**keys, **limits) as service:
        yield service


def subclasses(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
    """Return the class and all that derive from it."""
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def checked(answer: httpx.Response) -> Code:
    """Return the code of a problem document whose status, title and order of members are as documented."""
    document: dict[str, Any] = answer.json()
    code = Code(document["code"])
    assert "application/problem+json" == answer.headers["content-type"]
    assert ["type", "title", "status", "detail", "code"] == list(document)[:5]
    assert (STATUS[code], TITLES[STATUS[code]]) == (document["status"], document["title"])
    assert STATUS[code] == answer.status_code
    return code


def test_every_code_has_a_status_and_a_cause() -> None:
    """Each code has one status and one test, and each error class and router status has a code."""
    assert set(Code) == set(STATUS) == {*WITH_KEYS, *WITHOUT_KEYS_AND_STORE, *IN_PROCESS}
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in Code)
    raised = {kind.code for kind in subclasses(errors.ServiceError)}
    assert set(Code) == raised | set(HTTP_CODES.values()) | {Code.ORIGIN_NOT_ALLOWED}
    assert all(status == STATUS[code] for status, code in HTTP_CODES.items())
    assert set(STATUS.values()) == set(TITLES)


def test_documented_codes_equal_the_code() -> None:
    """The table of docs/api.md lists every code once, in the order of the list, with its status, meaning and advice."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert [(code.value, str(STATUS[code])) for code in Code] == [(code, status) for code, status, _, _ in rows]
    assert all(text.endswith(".") for _, _, *texts in rows for text in texts)


def test_openapi_document_lists_the_codes() -> None:
    """The OpenAPI schema of a problem document requires `code` and enumerates the closed list."""
    schemas = create_app(read_settings(), print).api.openapi()["components"]["schemas"]
    assert {"type", "title", "status", "detail", "code"} == set(schemas["Problem"]["required"])
    assert sorted(Code) == sorted(schemas["Code"]["enum"])


@pytest.mark.parametrize("code", WITH_KEYS)
def test_request_gets_its_code(guarded: Service, code: Code) -> None:
    """A faulty request gets a problem document with the code of its fault."""
    method, path, headers, body = WITH_KEYS[code]
    assert code == checked(guarded.client.request(method, path, headers=headers, content=body))


def test_service_without_keys_and_store_names_what_is_missing() -> None:
    """Admin calls and stored data have their own codes where they are not configured."""
    with running(ENGINE_HEALTH_DATABASE_URL="") as service:
        for code, (method, path, headers, body) in WITHOUT_KEYS_AND_STORE.items():
            assert code == checked(service.client.request(method, path, headers=headers, content=body))


@pytest.mark.parametrize("code", IN_PROCESS)
def test_error_is_serialised_with_its_code(code: Code) -> None:
    """An error that no request causes on demand is serialised as a problem document with its code."""
    response = problem(IN_PROCESS[code], "/v1/predict", Metrics(CollectorRegistry()))
    headers = {name.decode(): value.decode() for name, value in response.raw_headers}
    assert code == checked(httpx.Response(response.status_code, headers=headers, content=bytes(response.body)))


def test_rejected_origin_is_no_malformed_request() -> None:
    """A rejected preflight request has the status of malformed HTTP, and its own code."""
    response = problem(OriginRejected("Disallowed CORS origin"), "/v1/predict", Metrics(CollectorRegistry()))
    assert Code.ORIGIN_NOT_ALLOWED == orjson.loads(response.body)["code"]


def test_open_inference_protocol_keeps_its_error_object() -> None:
    """Below /v2 an error has the protocol's one member and no code."""
    response = problem(errors.InvalidInput("wrong"), "/v2/models", Metrics(CollectorRegistry()))
    assert (400, {"error": "wrong"}) == (response.status_code, orjson.loads(response.body))


def test_every_route_returns_a_listed_error_code(guarded: Service) -> None:
    """Each route outside /v2 has a listed code for a missing key, a wrong method and a malformed body."""
    paths = create_app(read_settings(), print).api.openapi()["paths"]
    routes = [(path, method) for path, methods in paths.items() for method in methods if not path.startswith("/v2")]
    assert len(routes) >= 10
    for path, method in routes:
        url = re.sub(r"\{\w+\}", "unknown", path)
        bare = guarded.client.request(method, url)
        assert bare.status_code < 400 or checked(bare) in {Code.API_KEY_MISSING, Code.NOT_READY}, path
        assert Code.METHOD_NOT_ALLOWED == checked(guarded.client.request("PATCH", url, headers=ADMIN)), path
        answer = guarded.client.request(method, f"{url}?unknown=1", headers=ADMIN | JSON, content=b"{")
        assert answer.status_code < 400 or checked(answer), path
        assert answer.status_code == 400 or method == "get", path


def test_console_decides_by_codes_and_never_by_texts() -> None:
    """The console's JavaScript compares the `code` of a problem with listed codes, and searches no error text."""
    scripts = [path.read_text() for path in (ROOT / "service").rglob("*.js")]
    compared = {code for text in scripts for code in re.findall(r"\.code [!=]== \"(\w+)\"", text)}
    (key_codes,) = (found for text in scripts for found in re.findall(r"KEY_CODES = new Set\(\[(.*?)\]", text))
    assert {"record_not_found", "store_not_configured", "overloaded"} <= compared <= set(Code)
    assert {"api_key_missing", "api_key_unknown", "not_admin"} == set(re.findall(r"\w+", key_codes)) <= set(Code)
    for text in scripts:
        assert not re.search(
            r"\.test\([\w.]*(message|detail)|(message|detail)\.(includes|match|startsWith)|message [!=]==", text
        )
