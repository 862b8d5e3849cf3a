import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from model import contract
from model.contract import ContractError, Manifest
from model.evaluation.evaluate import ARTEFACT
from model.numerics import softmax

SMALL = {"name": "m", "version": "1", "classes": ["a", "b"]}


def test_manifest_is_read_as_written(manifest: Manifest) -> None:
    """A manifest is read from a file as it was written, unknown fields included."""
    with_more = contract.parse_manifest(json.dumps({**manifest.model_dump(mode="json"), "from_the_future": {"x": 1}}))
    assert with_more == contract.parse_manifest(with_more.model_dump_json())
    assert {"x": 1} == with_more.model_dump()["from_the_future"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": []}, "classes"),
        ({"classes": ["a", "a"]}, "classes has a duplicate name"),
        ({"name": "../x"}, "name"),
        ({"temperature": 0}, "temperature"),
        ({"schema_version": 2}, "schema_version 2"),
        ({"window": 0}, "window"),
        ({"conformal": {"level": 1.5, "threshold": 0.1}}, "conformal.level"),
        ({"reference": {"confidence": {"edges": [0.5, 0.5], "shares": [1, 1, 1]}}}, "increasing edges"),
    ],
)
def test_invalid_manifest_error_names_the_field(change: dict[str, object], message: str) -> None:
    """A field out of its range is an error that names the field."""
    with pytest.raises(ContractError, match=message):
        contract.parse_manifest(json.dumps(SMALL | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "m"}'])
def test_text_that_is_not_a_manifest_raises(text: str) -> None:
    """Text other than a JSON object with the required fields is an error of one line."""
    with pytest.raises(ContractError) as error:
        contract.parse_manifest(text)
    assert "\n" not in str(error.value)


def test_changed_byte_breaks_the_seal() -> None:
    """A flipped bit at each of 100 places of the artefact is detected."""
    content = ARTEFACT.read_bytes()
    contract.check_seal(content)
    for place in np.random.default_rng(0).integers(0, len(content), 100):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(ContractError, match="seal"):
            contract.check_seal(bytes(changed))


def test_damaged_seal_is_not_a_missing_seal() -> None:
    """A flipped bit in the seal, or in the field that declares it, is detected."""
    content = ARTEFACT.read_bytes()
    seal, word = contract._SEAL.search(content), content.index(contract.SEALED)
    assert seal is not None
    for place in (*range(*seal.span()), *range(word, word + len(contract.SEALED))):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(ContractError, match="seal"):
            contract.check_seal(bytes(changed))


def test_write_seals_the_file_and_preserves_weights(tmp_path: Path) -> None:
    """A file with another manifest has a valid seal and the same weights."""
    before = onnx.load(ARTEFACT)
    digest = contract.write(ARTEFACT.read_bytes(), Manifest.model_validate(SMALL), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    contract.check_seal(content)
    assert digest == contract.digest(content) != contract.digest(ARTEFACT.read_bytes())
    assert before.graph == onnx.load_model_from_string(content).graph


def test_artefact_has_all_documented_fields(manifest: Manifest) -> None:
    """Classes, channels with units and ranges, golden windows, references, training and metrics exist."""
    assert contract.CLASSES == manifest.classes
    assert contract.CHANNELS == manifest.channel_names
    assert all(channel.description and channel.training_range for channel in manifest.channels)
    assert (125.0, 50.0) == manifest.rul_thresholds
    assert manifest.golden
    assert manifest.conformal is not None
    assert 0.9 == manifest.conformal.level
    assert manifest.reference is not None
    assert set(contract.CHANNELS) == set(manifest.reference.channels)
    assert {"data", "split", "seed", "code"} <= set(manifest.training)
    assert {"held_out_engines"} <= set(manifest.metrics)
    assert ARTEFACT.stat().st_size < 2 * 2**20


def test_golden_windows_have_different_classes(manifest: Manifest) -> None:
    """The golden windows have different outputs."""
    assert len({int(softmax(golden.logits).argmax()) for golden in manifest.golden}) > 1
