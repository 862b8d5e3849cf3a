import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.processes import running

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "15"))  # for each operation; `make fuzz` asks for more
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
NAMES = Path(__file__).parent / "schemathesis.toml"  # the one model's, without which most paths are 404


def test_generated_requests_cause_no_server_error(tmp_path: Path) -> None:
    """Whatever is generated from the OpenAPI document, for every route: no 5xx, no status that it does not mention."""
    with running(ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(NAMES), "run"]
        chosen = ["--checks", CHECKS, "-n", str(EXAMPLES), "--phases", "examples,coverage,fuzzing"]
        asked = [*command, f"{service.client.base_url}/openapi.json", *chosen, "-H", "X-API-Key: wheel"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=tmp_path)  # it leaves a folder
        assert 0 == done.returncode, done.stdout[-5000:]
        generated = re.search(r"(\d+) generated", done.stdout)
        assert generated
        print(f"{generated[1]} requests")  # shown by `make fuzz`
        assert int(generated[1]) > 4 * EXAMPLES
        assert 200 == service.client.get("/readyz").status_code
