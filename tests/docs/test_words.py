"""The word list of docs/development.md: words that have no place in sources, documents and messages."""

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPLACEMENTS = {  # what to avoid, and what to write
    "told": "given, reported, configured",
    "said": "stated, predicted",
    "whoever": "the client, the caller",
    "nobody": "no client",
    "somebody": "a client",
    "beside": "with, next to, while",
    "mended": "corrected",
    "in force": "active",
    "of its own": "a separate one",
    "so many": "the number",
    "at once": "immediately, together",
    "in mind": "cached",
    "company": "other rows of the batch",
    "lies": "is, is stored",
    "tells of": "describes",
    "hush": "suppress",
    "deaf": "not reachable",
    "breathes?": "respond",
    "testif(?:y|ies)": "label",
    "rooms?": "module, capacity",
    "remembered": "stored",
    "testimony": "label",
    "tempering": "temperature change",
    "not ruled out": "possible classes",
}
# Between the words of a phrase may be a line break, with the mark of a comment
PATTERN = re.compile(r"\b(" + "|".join(REPLACEMENTS).replace(" ", r"\s+(?:(?:#|//|\*)\s*)?") + r")\b", re.IGNORECASE)
FOLDERS = ("service", "model", "export", "ops", "benchmarks", "docs", "tests")
SUFFIXES = {".py", ".md", ".js", ".html", ".css", ".yml", ".yaml", ".toml", ""}
COLUMN = '"told"'  # of the database; a migration would have to rename it
TEXT_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of comments and strings of Python, and the whole of any other file."""
    source = path.read_text()
    if path.suffix == ".md":  # names in code are checked elsewhere, and a changelog has those of before
        source = re.sub(r"`[^`\n]+`", "``", source)
    if path.suffix != ".py":
        yield 1, source
        return
    lines: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in TEXT_TOKENS and token.string != COLUMN:
            lines.setdefault(token.start[0], []).append(token.string)
    comments = {line: texts[-1] for line, texts in lines.items() if texts[-1].startswith("#")}
    for line, texts in lines.items():
        yield line, " ".join(texts)
        if line in comments and line + 1 in comments:  # a phrase may go on in the next comment
            yield line, f"{comments[line]} {comments[line + 1]}"


def misuses(path: Path) -> Iterator[str]:
    """Yield place and word of each text of a file that uses a word of the list."""
    for line, text in texts_of(path):
        for match in PATTERN.finditer(text):
            word, place = " ".join(match[0].split()), line + text[: match.start()].count("\n")
            yield f"{path.relative_to(ROOT)}:{place}: {word!r}"


def checked_files() -> list[Path]:
    """Return the files of the repository with text, without this one."""
    names = subprocess.check_output(["git", "ls-files", *FOLDERS, ":(glob)*"], cwd=ROOT, text=True).splitlines()
    paths = [ROOT / name for name in names]
    return [path for path in paths if path.suffix in SUFFIXES and path.is_file() and path != Path(__file__)]


def test_texts_use_no_word_of_the_list() -> None:
    """Comments, docstrings, messages and documents use the standard terms in place of the words of the list."""
    paths = checked_files()
    assert len(paths) > 350
    assert sum(len(list(texts_of(path))) for path in paths) > 12_000
    assert [] == sorted({misuse for path in paths for misuse in misuses(path)})


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("a.py", 'told = 1\n"""A docstring that\nsaid so."""\n', ["a.py:3: 'said'"]),
        (
            "a.py",
            "x = f'nobody {1}'  # it is in\n# force at\nonce = 2  # no\n",
            ["a.py:1: 'nobody'", "a.py:1: 'in # force'"],
        ),
        ("a.md", "One\ntwo at\nonce, Deafening.\n", ["a.md:2: 'at once'"]),
        ("a.js", "// so\n// many\nconst room = 1;\n", ["a.js:1: 'so // many'", "a.js:3: 'room'"]),
    ],
)
def test_word_list_finds_words_and_phrases(
    name: str, source: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words are found in strings and comments, not in names of Python; phrases also across lines."""
    monkeypatch.setattr("tests.docs.test_words.ROOT", tmp_path)
    (tmp_path / name).write_text(source)
    assert expected == list(misuses(tmp_path / name))
