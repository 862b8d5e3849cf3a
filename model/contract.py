"""The artefact: the manifest in the ONNX file, and how it is read, written and sealed.

The manifest is JSON under `metadata_props["manifest"]`. `metadata_props["seal"]` is the sha256 of the whole file with
the digits of the seal read as zeros, so any changed byte is detected without a second file.
Imports nothing else from this project. Needs onnx only for writing.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 1
INPUT, LOGITS, RUL = "telemetry", "logits", "rul"
# Input and output of the overlap graph: the first row of each window; whether its outputs equal the network's bits.
STARTS, EXACT = "starts", "exact"
CLASSES = ("normal", "degrading", "critical")
RUL_THRESHOLDS = (125.0, 50.0)  # normal above the first, critical at or below the last
RUL_CAP = 125.0
CHANNEL_TABLE = (  # name, unit, what it is (Saxena et al. 2008, table 2)
    ("op_setting_1", "kft", "altitude"),
    ("op_setting_2", "Mach", "flight speed"),
    ("op_setting_3", "deg", "throttle resolver angle"),
    ("sensor_2", "degR", "T24, total temperature at LPC outlet"),
    ("sensor_3", "degR", "T30, total temperature at HPC outlet"),
    ("sensor_4", "degR", "T50, total temperature at LPT outlet"),
    ("sensor_7", "psia", "P30, total pressure at HPC outlet"),
    ("sensor_8", "rpm", "Nf, physical fan speed"),
    ("sensor_9", "rpm", "Nc, physical core speed"),
    ("sensor_11", "psia", "Ps30, static pressure at HPC outlet"),
    ("sensor_12", "pps/psi", "phi, ratio of fuel flow to Ps30"),
    ("sensor_13", "rpm", "NRf, corrected fan speed"),
    ("sensor_14", "rpm", "NRc, corrected core speed"),
    ("sensor_15", "", "BPR, bypass ratio"),
    ("sensor_17", "", "htBleed, bleed enthalpy"),
    ("sensor_20", "lbm/s", "W31, HPT coolant bleed"),
    ("sensor_21", "lbm/s", "W32, LPT coolant bleed"),
)
CHANNELS = tuple(name for name, _, _ in CHANNEL_TABLE)
SETTINGS, SENSORS = CHANNELS[:3], CHANNELS[3:]

MANIFEST_KEY, SEAL_KEY = "manifest", "seal"
# Optional graphs in base64, with the same output bits as the network's own.
CHANNEL_MAJOR_KEY, OVERLAP_KEY = "plan", "histories"
UNSEALED = b"0" * 64
SEALED = b'"sealed":true'  # in the manifest, so a damaged seal is not mistaken for a missing one
# metadata_props is a protobuf map entry: field 1 the key, field 2 the value, each preceded by its length (64 = "@")
_SEAL = re.compile(rb"\x0a\x04seal\x12\x40([0-9a-f]{64})")


class ContractError(ValueError):
    """An artefact that violates the contract. The message is one line that states the violation."""


class Part(BaseModel):
    """Frozen part of a manifest. Unknown fields are preserved, so that older tools do not damage a newer manifest."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Channel(Part):
    """One column of the input, in physical units."""

    name: str
    unit: str = ""
    description: str = ""
    training_range: tuple[float, float] | None = None


class Conformal(Part):
    """Prediction sets at the artefact's own temperature: the classes whose score is at most the threshold."""

    method: Literal["lac", "aps"] = "lac"
    level: float = Field(gt=0, lt=1)
    threshold: float = Field(ge=0, le=1)


class Golden(Part):
    """A window and the output of the network at export."""

    telemetry: list[Any]
    logits: list[float]
    rul: float | None = None


class Histogram(Part):
    """Shares of held-out values between edges. The outer bins are open, so there is one more share than edges."""

    edges: list[float]
    shares: list[float]

    @model_validator(mode="after")
    def _one_share_more(self) -> "Histogram":
        if len(self.shares) != len(self.edges) + 1 or sorted(set(self.edges)) != self.edges:
            raise ValueError("a histogram needs increasing edges, and one more share than edges")
        return self


class Reference(Part):
    """Label-free statistics of held-out engines, the reference of drift."""

    confidence: Histogram | None = None
    entropy_nats: Histogram | None = None
    channels: dict[str, Histogram] = {}


class Conditions(Part):
    """Baselines of each operating condition in physical units, used for attribution."""

    setting_scales: tuple[float, ...]  # divisors of the settings when the nearest condition is computed
    usual: tuple[tuple[float, ...], ...]  # a row of all channels for each condition, settings first
    deviations: tuple[tuple[float, ...], ...] = ()  # of the sensors, a row for each condition


class Manifest(Part):
    """The manifest of an artefact. A foreign classifier requires only `classes`, `name` and `version`."""

    schema_version: int = SCHEMA_VERSION
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    classes: tuple[str, ...] = Field(min_length=1)
    channels: tuple[Channel, ...] = ()
    window: int | None = Field(default=None, ge=1)
    rul_thresholds: tuple[float, ...] | None = None
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    conformal: Conformal | None = None
    tolerance: float = Field(default=1e-4, gt=0)
    golden: tuple[Golden, ...] = ()
    reference: Reference | None = None
    conditions: Conditions | None = None
    sealed: bool = False  # whether the file has a seal
    training: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version {self.schema_version} is not {SCHEMA_VERSION}")
        for kind, names in (("classes", self.classes), ("channels", tuple(c.name for c in self.channels))):
            if len(set(names)) != len(names):
                raise ValueError(f"{kind} has a duplicate name")
        if self.conditions and any(len(row) != len(self.channels) for row in self.conditions.usual):
            raise ValueError("conditions need a value for each channel")
        return self

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the input's columns, in order."""
        return tuple(channel.name for channel in self.channels)


def parse_manifest(text: str) -> Manifest:
    """Parse the manifest of an artefact.

    Raises:
        ContractError: not JSON, a field missing or out of its range; the message names the first such field.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ContractError(f"manifest: {place}: {first['msg']}") from None


def digest(content: bytes) -> str:
    """Return the name of a model: sha256 of its file, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def seal_of(content: bytes) -> str:
    """Return the correct seal of a file: its sha256 with the digits of the seal read as zeros."""
    return digest(_SEAL.sub(lambda match: match[0].replace(match[1], UNSEALED), content))


def check_seal(content: bytes) -> None:
    """Reject a file that changed after it was written. A foreign file with neither a seal nor a claim of one is valid.

    Raises:
        ContractError: the seal does not match the content.
    """
    seals, claimed = _SEAL.findall(content), SEALED in content
    if (seals or claimed) and (len(seals) != 1 or seals[0].decode() != seal_of(content)):
        raise ContractError("the file was changed after it was written: its seal does not match its content")


def read_graph(metadata: Mapping[str, str], key: str) -> bytes | None:
    """Return an optional graph from the metadata of a file, or None.

    Raises:
        binascii.Error: it is not base64.
    """
    text = metadata.get(key)
    return None if text is None else base64.b64decode(text, validate=True)


def write(
    source: bytes, manifest: Manifest, target: Path, overlap: bytes | None = None, channel_major: bytes | None = None
) -> str:
    """Write an ONNX file with a manifest, optional other graphs and a seal. Earlier ones are replaced.

    Returns the digest of the written file.
    """
    import onnx

    proto = onnx.load_model_from_string(source)
    metadata = {entry.key: entry.value for entry in proto.metadata_props if entry.key not in (MANIFEST_KEY, SEAL_KEY)}
    metadata[MANIFEST_KEY] = manifest.model_copy(update={"sealed": True}).model_dump_json()
    metadata |= {
        key: base64.b64encode(graph).decode()
        for key, graph in ((OVERLAP_KEY, overlap), (CHANNEL_MAJOR_KEY, channel_major))
        if graph is not None
    }
    onnx.helper.set_model_props(proto, metadata | {SEAL_KEY: UNSEALED.decode()})
    content = proto.SerializeToString(deterministic=True)
    content = content.replace(b"\x12\x40" + UNSEALED, b"\x12\x40" + seal_of(content).encode())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return digest(content)
