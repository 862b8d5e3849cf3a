"""The Dockerfile, as far as it can be judged without building it; `tests/container.sh` builds it."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from model import contract
from model.evaluation.evaluate import ARTEFACT
from service.errors import SettingsRejected
from service.settings import read_settings
from tests.support.processes import Service

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
# Instructions, continued lines joined, without comments.
LINES = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line
]
BUILD, FINAL = (
    [(name, rest) for name, rest in LINES[begin:end]]
    for stages in ([k for k, line in enumerate(LINES) if line[0] == "FROM"],)
    for begin, end in zip(stages, [*stages[1:], None], strict=True)
)


def given(name: str, stage: list[tuple[str, str]] = FINAL) -> list[str]:
    """Return the arguments of every instruction of this name in a stage."""
    return [rest for instruction, rest in stage if instruction == name]


def test_hadolint_has_nothing_to_say() -> None:
    """The Dockerfile is clean by every rule of hadolint, and turns none off."""
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "not installed: `make test` does"
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True)
    assert (0, b"") == (done.returncode, done.stdout + done.stderr)
    assert "hadolint ignore" not in TEXT


def test_old_builders_can_build_it() -> None:
    """No syntax line, no heredoc, no flag of COPY or RUN that an old builder does not know; two stages on one base."""
    assert not re.search(r"^#\s*syntax", TEXT, re.MULTILINE | re.IGNORECASE)
    assert "<<" not in TEXT
    flags = [word for name, rest in LINES if name in ("COPY", "RUN") for word in rest.split() if rest.startswith("--")]
    assert ["--from=build"] == [word for word in flags if word.startswith("--")]
    assert ["python:3.11-slim AS build", "python:3.11-slim"] == [rest for name, rest in LINES if name == "FROM"]


def test_everything_that_is_installed_is_hashed() -> None:
    """Packages come from hashed locks as wheels; nothing else is fetched, and every build tool stays behind."""
    installs = re.findall(r"pip (?:--python \S+ )?(?:install|wheel) ([^&]*)", " && ".join(given("RUN", BUILD)))
    fetching = [words for words in installs if "--no-index" not in words and "--no-build-isolation" not in words]
    assert ["requirements-build.lock", "requirements.lock"] == [shlex.split(words)[-1] for words in fetching]
    assert all({"--require-hashes", "--only-binary"} <= set(words.split()) for words in fetching)
    for name in ("requirements-build.lock", "requirements.lock"):
        entries = re.split(r"^(?=[a-z0-9.-]+==)", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
        assert entries
        assert all("--hash=sha256:" in entry for entry in entries)
    assert ["--from=build /opt/engine-health /opt/engine-health"] == given("COPY")


def test_image_runs_as_user_10001() -> None:
    """The image runs as user 10001, who owns the data volume only, and stops by SIGTERM."""
    assert ["10001:10001"] == given("USER")
    assert ["/data"] == given("WORKDIR") == given("VOLUME")
    assert given("RUN")[0].endswith("&& mkdir /data && chown 10001:10001 /data")
    assert ["SIGTERM"] == given("STOPSIGNAL")
    names = [name for name, _ in FINAL]
    assert names.index("RUN") < names.index("USER") < names.index("CMD")


def test_health_check_passes_when_ready_only(service: Service) -> None:
    """The image's own health check, run as it stands, passes for a ready service and fails where none listens."""
    (line,) = given("HEALTHCHECK")
    assert not re.search("curl|wget", line)
    _, *command = json.loads(line[line.index("CMD [") + 4 :])
    for port, code in ((service.client.base_url.port, 0), (1, 1)):
        environment = os.environ | {"ENGINE_HEALTH_PORT": str(port)}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True)
        assert code == done.returncode, done.stderr


def test_labels_are_true() -> None:
    """The digest and the version that the image is labelled with are those of the bundled model and of the package."""
    (line,) = given("LABEL")
    labels = dict(word.split("=", 1) for word in shlex.split(line))
    (digest,) = re.findall(r"^ARG MODEL_DIGEST=(\w+)$", TEXT, re.MULTILINE)
    assert contract.digest(ARTEFACT.read_bytes()) == digest
    assert "$MODEL_DIGEST" == labels["engine-health.model.digest"]
    assert f'version = "{labels["org.opencontainers.image.version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_build_context_has_only_copied_files() -> None:
    """The build context has only files that a COPY names, without checkpoints and bytecode."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    copied = {word for line in given("COPY", BUILD) for word in line.split()[:-1]}
    assert "*" == rules[0]
    assert copied == {rule[1:] for rule in rules if rule.startswith("!")}
    assert {"**/__pycache__", "**/*.pt"} == {rule for rule in rules[1:] if not rule.startswith("!")}


def test_wheel_contains_every_package_and_data_file() -> None:
    """Each folder of Python, and each other file of model, export and service, is in the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tracked = subprocess.check_output(["git", "ls-files", "model", "export", "service"], cwd=ROOT, text=True).split()
    folders = {str(Path(name).parent).replace("/", ".") for name in fnmatch.filter(tracked, "*.py")}
    assert len(folders) > 15
    patterns = setuptools["packages"]["find"]["include"]
    assert [] == [folder for folder in folders if not any(fnmatch.fnmatch(folder, pattern) for pattern in patterns)]
    rules = [
        f"{package.replace('.', '/')}/{rule}" for package, some in setuptools["package-data"].items() for rule in some
    ]
    others = [name for name in tracked if not name.endswith((".py", ".pt"))]  # a checkpoint is for training
    assert "model/artefact/engine-health.onnx" in others
    assert [] == [name for name in others if not any(fnmatch.fnmatch(name, rule) for rule in rules)]


def test_secret_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gives a setting that neither variable nor flag gives; an empty one gives nothing."""
    (tmp_path / "engine_health_api_keys").write_text("first,second\n")
    (tmp_path / "engine_health_database_url").write_text("")
    monkeypatch.setenv("ENGINE_HEALTH_SECRETS", str(tmp_path))
    monkeypatch.setenv("ENGINE_HEALTH_API_KEYS", "")
    found = read_settings()
    assert ("first,second", "sqlite:///engine-health.db") == (found.api_keys, found.database_url)
    monkeypatch.setenv("ENGINE_HEALTH_API_KEYS", "variable")
    assert "variable" == read_settings().api_keys
    assert "flag" == read_settings(api_keys="flag").api_keys
    (tmp_path / "engine_health_database_url").write_text("postgresql://health:word@db/health\n")
    assert "postgresql://health:word@db/health" == read_settings().database_url
    monkeypatch.setenv("ENGINE_HEALTH_DATABASE_URL", "")
    assert "" == read_settings().database_url


def test_secret_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A folder or bytes in place of a secret are refused with its path, and without its content."""
    path = tmp_path / "engine_health_admin_keys"
    path.mkdir()
    with pytest.raises(SettingsRejected, match=rf"^{path}: Is a directory$"):
        read_settings(secrets=tmp_path)
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsRejected, match=rf"^{path}: no UTF-8 text$"):
        read_settings(secrets=tmp_path)
