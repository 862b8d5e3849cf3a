"""Every setting of the service: one frozen class, read once from the environment. Errors name key and value.

The table in docs/configuration.md is generated from the fields below.
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

    host: str = Field(
        "127.0.0.1", description="address to listen on; the default accepts connections from this machine only"
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 selects a free port")
    workers: int = Field(1, ge=1, le=256, description="number of worker processes, which share the port")
    model: Path = Field(BUNDLED, description="path of the artefact")
    model_digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = Field(
        "", description="required sha256 of the artefact; empty accepts any"
    )
    database_url: str = Field(
        "sqlite:///engine-health.db",
        description="URL of the store, SQLite or PostgreSQL; empty disables the store",
    )
    retention_days: float = Field(
        0.0, ge=0, description="age in days at which predictions, flights and labels are deleted; 0 keeps them"
    )
    max_body_bytes: int = Field(
        32 * 2**20,
        ge=1,
        description="maximum size of a request body in bytes; larger bodies get 413 before they are read",
    )
    max_buffered_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="maximum size of all request bodies in memory, in bytes per worker; beyond it 429",
    )
    max_instances: int = Field(4096, ge=1, description="maximum number of instances in a request; beyond it 422")
    max_queue_rows: int = Field(
        16384, ge=1, description="maximum number of rows that wait for inference; beyond it 429"
    )
    max_queue_seconds: float = Field(
        2.0, gt=0, description="maximum time in seconds that a row waits for inference; beyond it 429"
    )
    max_batch_rows: int = Field(
        64, ge=1, le=4096, description="maximum number of rows in an inference batch; larger requests are split"
    )
    request_seconds: float = Field(
        30.0, gt=0, description="maximum time in seconds in which a request arrives; beyond it 408"
    )
    deterministic: bool = Field(
        False, description="1: predictions do not depend on the other rows of the batch, at some cost in speed"
    )
    api_keys: str = Field("", description="comma-separated API keys; empty requires no key")
    admin_keys: str = Field(
        "", description="comma-separated keys for loading models and setting temperatures; empty disables these calls"
    )
    cors_origins: str = Field(
        "", description="comma-separated origins of web pages that may call the service; empty allows none"
    )
    threads: int = Field(0, ge=0, description="number of threads of one inference; 0 uses all available cores")
    drain_seconds: float = Field(
        3.0,
        ge=0,
        le=600,
        description="time in seconds between SIGTERM and closing, in which /readyz returns 503 and requests are served",
    )
    secrets: Path = Field(
        Path("/run/secrets"),
        description="folder with files `engine_health_SETTING`, used for settings that neither flag nor variable sets",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest severity that is logged"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json: one object per line; text: readable lines; auto: text on a terminal, otherwise json"
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
