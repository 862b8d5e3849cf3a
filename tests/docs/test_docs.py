"""Tests of documents against the code: links resolve, names exist, and figures are those of the artefact."""

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
each_current_document = pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
SUFFIXES = r"py|yml|yaml|sh|lock|json|md|onnx|toml|js|html|png"


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document: its headings, as GitHub converts them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(path: str, folder: Path) -> bool:
    """Return whether a path is a file of the repository, relative to its root, the folder, `service` or `model`."""
    places = (ROOT / path, folder / path, ROOT / "service" / path, ROOT / "model" / path)
    return any(place.exists() for place in places)


def links(text: str) -> list[str]:
    """Return the targets of the links of a document."""
    return re.findall(r"\]\(([^)\s]+)\)", text)


def files_named(text: str) -> set[str]:
    """Return the paths with a folder and a known suffix."""
    return set(re.findall(rf"(?<![\w./:$-])((?:[\w-]+/)+[\w.-]+\.(?:{SUFFIXES}))\b", text))


def settings_named(text: str) -> set[str]:
    """Return the environment variables of the service."""
    return set(re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", text))


def targets_named(text: str) -> set[str]:
    """Return the targets of commands like `make test`."""
    return {word for words in re.findall(r"`make ([a-z][a-z -]*)", text) for word in words.split()}


def calls_named(text: str) -> list[str]:
    """Return the paths below /v1 and /v2."""
    return re.findall(r"(?<![\w/.])/v[12](?:/[\w-]+)*", text)


def metrics_named(text: str) -> set[str]:
    """Return the metrics of the service."""
    return set(re.findall(r"\bengine_health_[a-z0-9_]+\b", text))


@pytest.mark.parametrize(
    ("find", "least"),
    [(links, 15), (files_named, 25), (settings_named, 20), (targets_named, 15), (calls_named, 60), (metrics_named, 3)],
)
def test_patterns_find_names_in_the_documents(find: Callable[[str], Collection[str]], least: int) -> None:
    """Each pattern of the tests below finds names in the documents. A pattern without a match would verify nothing."""
    assert least <= len(find("\n".join((ROOT / name).read_text() for name in DOCUMENTS if name != "CHANGELOG.md")))


@each_document
def test_links_resolve(name: str) -> None:
    """Each link of a document within the repository leads to a tracked file, and its anchor to a heading."""
    path = ROOT / name
    for link in links(path.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.is_dir() or str(file.relative_to(ROOT)) in TRACKED, link
        assert not anchor or anchor in anchors(file), link


@each_current_document
def test_named_files_exist(name: str) -> None:
    """Each path with a folder and a known suffix is a file of the repository, except in folders of generated files."""
    named = files_named((ROOT / name).read_text())
    generated = ("build/", "data/", "secrets/", "etc/")
    folder = (ROOT / name).parent
    assert [] == sorted(path for path in named if not path.startswith(generated) and not exists(path, folder))


@each_current_document
def test_named_settings_and_make_targets_exist(name: str) -> None:
    """Each ENGINE_HEALTH_ variable is a setting, and each `make` target is in the Makefile."""
    text = (ROOT / name).read_text()
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert set() == settings_named(text) - known
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set() == targets_named(text) - targets


def test_make_help_lists_every_phony_target() -> None:
    """The targets that `make help` lists are those of .PHONY, so a file of the same name never prevents a command."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    listed = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


@each_current_document
def test_named_calls_exist(name: str) -> None:
    """Each path below /v1 and /v2 in a document is a path of the service, or the beginning of one."""
    paths = [re.sub(r"\{\w+\}", "x", path) for path in create_app(read_settings(), print).api.openapi()["paths"]]
    text = re.sub(r"There is no `[^`]*`", "", (ROOT / name).read_text())
    calls = {re.sub(r"(models|versions|engines)/[\w-]+", r"\1/x", call) for call in calls_named(text)}
    assert [] == sorted(
        call for call in calls if not any(path == call or path.startswith(call + "/") for path in paths)
    )


@each_current_document
def test_named_metrics_exist(name: str) -> None:
    """Each metric in a document occurs in the sources of the service or of the Prometheus rules."""
    sources = "".join((ROOT / path).read_text() for path in TRACKED if path.startswith(("service/", "ops/")))
    named = metrics_named((ROOT / name).read_text())
    settings = {PREFIX.lower() + field for field in Settings.model_fields}
    assert [] == sorted(metric for metric in named - settings if metric.removeprefix(PREFIX.lower()) not in sources)


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    """`mkdocs build --strict` passes: each page is in the navigation, and each link and anchor exists."""
    mkdocs = Path(sys.executable).parent / "mkdocs"
    if not mkdocs.exists():
        message = "mkdocs is not installed: install the extra `docs`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
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


def test_readme_performance_is_that_of_benchmarks_page() -> None:
    """Each ratio of the performance table in the README is in docs/benchmarks.md, with its date."""
    section = (ROOT / "README.md").read_text().partition("## Performance")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert ["case", "compared with", "ratio", "date"] == rows[0]
    assert 4 == len(rows[2:])
    for _, _, ratio, date in rows[2:]:
        assert f"**{ratio}**" in page or f"{ratio} times" in page
        assert date in page


def test_pages_have_one_to_five_screens() -> None:
    """A page, without tables and code, has at most 250 lines."""
    pages = [name for name in DOCUMENTS if name.startswith("docs/")]
    assert len(pages) > 30
    for name in pages:
        text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert len([line for line in text.splitlines() if not line.startswith("|")]) <= 250, name


def test_model_card_states_size_of_artefact() -> None:
    """The model card states the size of the artefact in KiB."""
    (size,) = re.findall(r"(\d+) KiB of ONNX", (ROOT / "docs" / "model-card.md").read_text())
    assert int(size) == round(ARTEFACT.stat().st_size / 1024)


@pytest.mark.parametrize("name", ["docs/configuration.md", "SECURITY.md"])
def test_paths_without_authentication_are_documented(name: str) -> None:
    """Both documents name each path that needs no API key, except console and documentation, which they describe."""
    text = (ROOT / name).read_text()
    for path in OPEN - {"/", "/docs", "/openapi.json"}:
        assert f"`{path}`" in text or f"`{path.rpartition('/')[0]}/*`" in text, path


def test_operations_page_agrees_with_image_and_compose() -> None:
    """User, volume, image and flags of `docker run` in docs/operations.md are those of Dockerfile and compose file."""
    text = (ROOT / "docs" / "operations.md").read_text()
    dockerfile = (ROOT / "Dockerfile").read_text()
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["engine-health"]
    assert f"docker build -t {compose['image']} ." in text
    assert "memory:/data" in compose["volumes"]
    assert "-v memory:/data" in text
    assert "USER 10001:10001" in dockerfile
    assert re.search(r"User\s10001", text)
    assert {"--read-only", "--cap-drop", "--security-opt"} <= set(text.split())
