"""The documents against what they speak of: links lead somewhere, names exist, figures are the artefact's."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import yaml

from model.evaluation.evaluate import ARTEFACT
from service.api.auth import OPEN
from service.app import create_app
from service.settings import PREFIX, Settings, read_settings

ROOT = Path(__file__).parents[2]
TRACKED = set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())
DOCUMENTS = sorted(name for name in TRACKED if name.endswith(".md"))
each_document = pytest.mark.parametrize("name", DOCUMENTS)
now = pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])  # that one tells of then
SUFFIXES = r"py|yml|yaml|sh|lock|json|md|onnx|toml|js|html|png"


def anchors(path: Path) -> set[str]:
    """What may stand behind # in a link to a document: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(path: str, folder: Path) -> bool:
    """Whether a path that a document names is a file of the repository: from its root, its folder or below a room."""
    places = (ROOT / path, folder / path, ROOT / "service" / path, ROOT / "model" / path)
    return any(place.exists() for place in places)


def links(text: str) -> list[str]:
    """The targets of the links of a document."""
    return re.findall(r"\]\(([^)\s]+)\)", text)


def files_named(text: str) -> set[str]:
    """Paths with a folder and a known ending."""
    return set(re.findall(rf"(?<![\w./:$-])((?:[\w-]+/)+[\w.-]+\.(?:{SUFFIXES}))\b", text))


def settings_named(text: str) -> set[str]:
    """Environment variables of the service."""
    return set(re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", text))


def targets_named(text: str) -> set[str]:
    """Targets of commands like `make test`."""
    return {word for words in re.findall(r"`make ([a-z][a-z -]*)", text) for word in words.split()}


def calls_named(text: str) -> list[str]:
    """Paths below /v1 and /v2."""
    return re.findall(r"(?<![\w/.])/v[12](?:/[\w-]+)*", text)


def metrics_named(text: str) -> set[str]:
    """Metrics of the service."""
    return set(re.findall(r"\bengine_health_[a-z0-9_]+\b", text))


@pytest.mark.parametrize(
    ("find", "least"),
    [(links, 15), (files_named, 25), (settings_named, 20), (targets_named, 15), (calls_named, 60), (metrics_named, 3)],
)
def test_patterns_find_names_in_the_documents(find: Callable[[str], Collection[str]], least: int) -> None:
    """The patterns of the tests below find names in the documents: an empty derivation proves nothing."""
    assert least <= len(find("\n".join((ROOT / name).read_text() for name in DOCUMENTS if name != "CHANGELOG.md")))


@each_document
def test_links_lead_somewhere(name: str) -> None:
    """Every link of a document that is not to another host is to a tracked file, and its anchor to a heading."""
    path = ROOT / name
    for link in links(path.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.is_dir() or str(found.relative_to(ROOT)) in TRACKED, link
        assert not anchor or anchor in anchors(found), link


@now
def test_files_that_are_named_exist(name: str) -> None:
    """A path with a folder and a known ending is a file of the repository; what lies in build and data is made."""
    named = files_named((ROOT / name).read_text())
    made = ("build/", "data/", "secrets/", "etc/")
    assert [] == sorted(one for one in named if not one.startswith(made) and not exists(one, (ROOT / name).parent))


@now
def test_settings_and_commands_that_are_named_exist(name: str) -> None:
    """Every ENGINE_HEALTH_ variable is a setting, and every `make` target is in the Makefile."""
    text = (ROOT / name).read_text()
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert set() == settings_named(text) - known
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set() == targets_named(text) - targets


def test_every_command_is_a_command() -> None:
    """Each target that `make help` lists runs whatever file has its name, and no other is declared to."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    listed = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


@now
def test_calls_that_are_named_exist(name: str) -> None:
    """Every path below /v1 and /v2 that a document names is one of the service, or the beginning of one."""
    paths = [re.sub(r"\{\w+\}", "x", path) for path in create_app(read_settings(), print).api.openapi()["paths"]]
    text = re.sub(r"There is no `[^`]*`", "", (ROOT / name).read_text())
    placed = {re.sub(r"(models|versions|engines)/[\w-]+", r"\1/x", call) for call in calls_named(text)}
    assert [] == sorted(one for one in placed if not any(path == one or path.startswith(one + "/") for path in paths))


@now
def test_metrics_that_are_named_exist(name: str) -> None:
    """Every metric that a document names is in the source that makes or records it."""
    sources = "".join((ROOT / path).read_text() for path in TRACKED if path.startswith(("service/", "ops/")))
    named = metrics_named((ROOT / name).read_text())
    settings = {PREFIX.lower() + field for field in Settings.model_fields}
    assert [] == sorted(one for one in named - settings if one.removeprefix(PREFIX.lower()) not in sources)


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    """`mkdocs build --strict` passes: every page is in the navigation, and every link and anchor leads somewhere."""
    mkdocs = Path(sys.executable).parent / "mkdocs"
    if not mkdocs.exists():
        assert not os.environ.get("CI"), "mkdocs is not installed"
        pytest.skip("mkdocs is not installed: extra `docs`")
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    assert len(list((tmp_path / "site").rglob("index.html"))) > 25


def test_readme_has_at_most_250_lines() -> None:
    """The README is an introduction: at most 250 lines, and it links every page of docs/ but the notes."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    pages = {name for name in DOCUMENTS if re.fullmatch(r"docs/[\w-]+\.md", name)}
    assert len(pages) > 15
    assert pages <= set(links(text))


def test_pages_have_one_to_five_screens() -> None:
    """A page, without tables and code, has at most 250 lines."""
    pages = [name for name in DOCUMENTS if name.startswith("docs/")]
    assert len(pages) > 30
    for name in pages:
        text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert len([line for line in text.splitlines() if not line.startswith("|")]) <= 250, name


def test_the_card_knows_the_size_of_the_artefact() -> None:
    """The size that the model card gives is the file's, in KiB."""
    (size,) = re.findall(r"(\d+) KiB of ONNX", (ROOT / "docs" / "model-card.md").read_text())
    assert int(size) == round(ARTEFACT.stat().st_size / 1024)


@pytest.mark.parametrize("name", ["docs/configuration.md", "SECURITY.md"])
def test_whatever_is_open_is_said_to_be(name: str) -> None:
    """Both documents name each call that needs no key, but for the pages, of which they speak as such."""
    text = (ROOT / name).read_text()
    for path in OPEN - {"/", "/docs", "/openapi.json"}:
        assert f"`{path}`" in text or f"`{path.rpartition('/')[0]}/*`" in text, path


def test_limits_that_documents_repeat_are_those_of_the_image() -> None:
    """User, port, folders and flags of `docker run` in docs/operations.md are those of Dockerfile and compose file."""
    text = (ROOT / "docs" / "operations.md").read_text()
    dockerfile = (ROOT / "Dockerfile").read_text()
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["engine-health"]
    assert f"docker build -t {compose['image']} ." in text
    assert "memory:/data" in compose["volumes"]
    assert "-v memory:/data" in text
    assert "USER 10001:10001" in dockerfile
    assert re.search(r"User\s10001", text)
    assert {"--read-only", "--cap-drop", "--security-opt"} <= set(text.split())
