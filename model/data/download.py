"""Download C-MAPSS: one zip from NASA's Prognostics Center of Excellence. Unpack nested archives, check sha256.

    python -m model.data.download URL [FOLDER]          # = make data

Uses only the standard library, so it runs before any environment exists.
"""

import argparse
import hashlib
import io
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_SECONDS = 60  # without receiving a byte
MAX_BYTES = 200 * 2**20  # of the download and of each file in it; the published sizes are 12 MB and below 10 MB
CHECKSUMS = {
    "RUL_FD001.txt": "a19c8ec94931949d0485bdc35118206e9c81c4547b422efb9cf86f4ceddbceca",
    "RUL_FD002.txt": "c851dd96a6ea6998d3c4a8f834d3c8013aa90e93a6ed950dc826ad0655b2906b",
    "RUL_FD003.txt": "df1e0566306b174a2de41c67a3e7a51877889598b78643fc3e5685259091b7cb",
    "RUL_FD004.txt": "196b836b85a95ac7fdbbf29c5fdf1657382eafa445644d114ffaaf50dc2975e1",
    "test_FD001.txt": "3cda7109ce17bafb5443f2ac926cfcf88154b941b8c4cf95eb55d1ddd6f52851",
    "test_FD002.txt": "de7b5bf7e998a985c378488480528b7c02cff1406a46740def362dda8d9b4e02",
    "test_FD003.txt": "299babd63c8d987cef079c4a425429f33b3a34797d803bbe2ad48c29dbd0d790",
    "test_FD004.txt": "1dc675fff0624bac10786927c6715b37d1297657137400d2b1a3138d777a3ba5",
    "train_FD001.txt": "963b5e22825b34d8b21c69e1aeb4af3e647050eb672ee8834ba4b5d91d2de0f8",
    "train_FD002.txt": "dac6c4dbc4e7c1bdeb5747da3d313d05c395bb99801b44a002b26a2ba13d788f",
    "train_FD003.txt": "2abbe9968cc5e8eb091980f51b20f62bb4127336d3482cb52071d53bf23329e2",
    "train_FD004.txt": "27ef6160b6a1dcb2613a88de9c239f763b223f02cdc41dc5cdedc5dc189b6218",
}


class DownloadError(Exception):
    """The download failed or its content differs from the published data. No file was written."""


def download(url: str, folder: Path) -> None:
    """Download, check and write the twelve files, or none of them.

    Raises:
        DownloadError: no response, content that is not a zip, a missing file or another sha256.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DownloadError(f"{url}: {error}") from None
    if len(content) > MAX_BYTES:
        raise DownloadError(f"{url}: the download exceeds the limit of {MAX_BYTES} bytes")
    try:
        files = dict(unpack_archive(content))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise DownloadError(f"{url}: {error}") from None
    for name, expected in CHECKSUMS.items():
        if name not in files:
            raise DownloadError(f"{url}: {name} is missing in the archive")
        actual = hashlib.sha256(files[name]).hexdigest()
        if actual != expected:
            raise DownloadError(f"{url}: {name} has sha256 {actual}, expected {expected}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in CHECKSUMS:
        partial = folder / f".{name}.partial"
        partial.write_bytes(files[name])
        os.replace(partial, folder / name)


def unpack_archive(content: bytes, depth: int = 3) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each listed file of a zip. Nested archives are opened up to `depth` levels."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            name = Path(entry.filename).name
            if entry.file_size > MAX_BYTES:
                raise DownloadError(f"{entry.filename}: {entry.file_size} bytes exceed the limit of {MAX_BYTES}")
            if name in CHECKSUMS:
                yield name, archive.read(entry)
            elif name.lower().endswith(".zip") and depth:
                yield from unpack_archive(archive.read(entry), depth - 1)


def main() -> None:
    """Download from the given URL into the folder."""
    parser = argparse.ArgumentParser(description="Download NASA's C-MAPSS and check it.")
    parser.add_argument("url")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(os.environ.get("CMAPSS_DIR") or "data/cmapss"))
    flags = parser.parse_args()
    try:
        download(flags.url, flags.folder)
    except DownloadError as error:
        raise SystemExit(f"data: {error}") from None
    print(f"wrote {len(CHECKSUMS)} files to {flags.folder}; every sha256 matches")


if __name__ == "__main__":
    main()
