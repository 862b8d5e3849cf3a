"""Every setting of the service: one frozen class, read once from the environment. Errors name key and value.

The table in the README is generated from the fields below.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsRejected

PREFIX = "ENGINE_HEALTH_"
BUNDLED = Path(__file__).parents[1] / "model" / "artefact" / "engine-health.onnx"


class Settings(BaseSettings):
    """Settings from the environment; flags of the command line override them."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="address to listen on; only this machine unless you say so")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    workers: int = Field(1, ge=1, le=256, description="serving processes that share the port")
    model: Path = Field(BUNDLED, description="path of the artefact; the bundled one if not set")
    model_digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = Field(
        "", description="sha256 that the artefact must have; empty accepts any"
    )
    database_url: str = Field(
        "sqlite:///engine-health.db",
        description="where predictions and truths are remembered, SQLite or PostgreSQL; empty remembers nothing",
    )
    retention_days: float = Field(
        0.0, ge=0, description="days after which predictions and flights are forgotten; 0 keeps them"
    )
    max_body_bytes: int = Field(
        32 * 2**20, ge=1, description="bytes of a request body; beyond it 413 before it is read"
    )
    max_buffered_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="bytes that all bodies held at once may have together, each worker; beyond it 429",
    )
    max_instances: int = Field(4096, ge=1, description="instances of one request; beyond it 422")
    max_queue_rows: int = Field(16384, ge=1, description="rows that may wait for the model; beyond it 429")
    max_queue_seconds: float = Field(2.0, gt=0, description="seconds that a row may wait for the model; beyond it 429")
    max_batch_rows: int = Field(
        64, ge=1, le=4096, description="rows of one inference; a larger request is cut and joined again"
    )
    request_seconds: float = Field(
        30.0, gt=0, description="seconds in which a request must have arrived; beyond it 408"
    )
    deterministic: bool = Field(
        False, description="1: the same window gives the same bits whatever its batch, at some cost in speed"
    )
    api_keys: str = Field("", description="comma-separated keys for predicting and reading; empty asks for none")
    admin_keys: str = Field(
        "", description="comma-separated keys for loading models and setting temperatures; empty turns those calls off"
    )
    cors_origins: str = Field("", description="comma-separated origins whose pages may call; empty allows none")
    threads: int = Field(0, ge=0, description="threads of one inference; 0 takes the cores this process may use")
    drain_seconds: float = Field(
        3.0, ge=0, le=600, description="seconds of being unready before closing, so that load balancers look away first"
    )
    secrets: Path = Field(
        Path("/run/secrets"),
        description="folder of files `engine_health_SETTING`, what a setting is that nothing else gives",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json: one object a line; text: for people; auto: text on a terminal, json elsewhere"
    )


def read_settings(**flags: object) -> Settings:
    """Return settings from files of secrets, overridden by the environment, overridden by flags that are not None.

    Raises:
        SettingsRejected: a value that cannot be used, with its variable; a secret that cannot be read.
    """
    flags = {key: value for key, value in flags.items() if value is not None}
    if os.environ.get(PREFIX + "DATABASE_URL") == "":  # other empty variables are ignored; this one disables the store
        flags = {"database_url": "", **flags}
    folder = flags.get("secrets") or os.environ.get(PREFIX + "SECRETS") or Settings.model_fields["secrets"].default
    flags = {**_secrets(Path(str(folder))), **flags}
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # validated there
    except ValidationError as error:
        first = error.errors()[0]
        key = PREFIX + str(first["loc"][0]).upper()
        raise SettingsRejected(f"{key}={first['input']!s}: {first['msg']}") from None


def _secrets(folder: Path) -> dict[str, object]:
    """Return the settings in files that the environment does not set; empty files are ignored.

    Docker, Compose and Kubernetes mount secrets as such files, so that no environment contains a key.
    """
    secrets: dict[str, object] = {}
    for name in Settings.model_fields:
        path = folder / (PREFIX + name).lower()
        try:
            if not os.environ.get(PREFIX + name.upper()) and path.exists() and (value := path.read_text().strip()):
                secrets[name] = value
        except (OSError, ValueError) as error:
            raise SettingsRejected(f"{path}: {getattr(error, 'strerror', None) or 'no UTF-8 text'}") from None
    return secrets
