"""A PostgreSQL cluster for tests, on loopback; it is deleted at the end.

PostgreSQL does not start as root: root starts it as the user postgres.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from benchmarks.load import free_port


@dataclass
class Postgres:
    """A running cluster that can be stopped, paused and started."""

    folder: Path
    port: int
    programs: Path

    def url(self, name: str, folder: Path | None = None) -> str:
        """Return the URL of a new, empty database, optionally with its tables in another folder."""
        with psycopg.connect(host="127.0.0.1", port=self.port, user="postgres", autocommit=True) as connection:
            space = ""
            if folder is not None:
                own = folder / "tables"
                own.mkdir()
                if os.geteuid() == 0:
                    shutil.chown(own, "postgres")
                connection.execute(f"CREATE TABLESPACE {name} LOCATION '{own}'")
                space = f" TABLESPACE {name}"
            connection.execute(f"CREATE DATABASE {name}{space}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start the server, and wait until it responds."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self._run(
            "pg_ctl", "-w", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "start"
        )

    def stop(self) -> None:
        """Stop the server immediately, as in a crash."""
        self._run("pg_ctl", "-w", "-D", str(self.folder / "data"), "-m", "immediate", "stop")

    def pause(self, paused: bool = True) -> None:
        """Pause or resume every process of the server, with open connections."""
        head = (self.folder / "data" / "postmaster.pid").read_text().split()[0]
        rest = subprocess.run(["ps", "-o", "pid=", "--ppid", head], capture_output=True, text=True, check=True)
        for process in (head, *rest.stdout.split()):
            os.kill(int(process), signal.SIGSTOP if paused else signal.SIGCONT)

    def make(self) -> None:
        """Create the cluster."""
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "postgres", "--auth=trust", "--no-sync")

    def _run(self, program: str, *arguments: str) -> None:
        other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*other, str(self.programs / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a cluster during the block; without PostgreSQL's programs skip the test, or fail it in CI."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        message = "no PostgreSQL server programs (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    folder = Path(tempfile.mkdtemp(prefix="engine-health-postgres-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    cluster = Postgres(folder, free_port(), programs[-1].parent)
    try:
        cluster.make()
        cluster.start()
        yield cluster
    finally:
        subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
