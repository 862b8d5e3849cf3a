import hashlib
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model.data import download
from tests.support.processes import serving


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def nasa_zip(files: dict[str, bytes]) -> bytes:
    """Nest archives like NASA: a folder with spaces contains the zip with the files."""
    return zipped({"6. Turbofan/readme.pdf": b"x", "6. Turbofan/CMAPSSData.zip": zipped(files)})


@contextmanager
def served(content: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield f"{url}/data.zip"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Replace the published files and checksums by twelve small files and theirs."""
    contents = {name: f"content of {name}".encode() for name in download.CHECKSUMS}
    monkeypatch.setattr(
        download, "CHECKSUMS", {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    )
    return contents


def test_official_files_match_their_checksums(cmapss_dir: Path, tmp_path: Path) -> None:
    """A zip of the official files is unpacked to the same bytes, and every checksum matches."""
    import gzip

    real = {
        p.name.removesuffix(".gz"): gzip.decompress(p.read_bytes())
        for p in cmapss_dir.glob("*.txt.gz")
        if p.name[0] in "tR"
    }
    if not real:
        pytest.skip("this C-MAPSS is not gzipped; the sums are checked on small files above")
    with served(nasa_zip(real)) as url:
        download.download(url, tmp_path / "cmapss")
    assert real == {path.name: path.read_bytes() for path in (tmp_path / "cmapss").iterdir()}


def test_wrong_checksum_writes_nothing(files: dict[str, bytes], tmp_path: Path) -> None:
    """If one byte of one file is changed, nothing is written."""
    with (
        served(nasa_zip(files | {"train_FD003.txt": b"changed"})) as url,
        pytest.raises(download.DownloadError, match=r"train_FD003\.txt has sha256"),
    ):
        download.download(url, tmp_path / "cmapss")
    assert not (tmp_path / "cmapss").exists()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [(b"<html>", 200, "zip"), (b"", 404, "404"), (zipped({}), 200, "missing in the archive")],
)
def test_invalid_download_error_names_the_url(
    files: dict[str, bytes], tmp_path: Path, content: bytes, status: int, message: str
) -> None:
    """A web page, an HTTP error and an empty archive are errors of one line with the URL."""
    assert files
    with served(content, status) as url, pytest.raises(download.DownloadError, match=message):
        download.download(url, tmp_path)


def test_unreachable_server_error_names_the_url(tmp_path: Path) -> None:
    """A refused connection is an error of one line with the URL."""
    with served(b"") as url:
        pass
    with pytest.raises(download.DownloadError, match=r"127\.0\.0\.1"):
        download.download(url, tmp_path)
