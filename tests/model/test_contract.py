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


def test_a_manifest_survives_writing_and_reading(manifest: Manifest) -> None:
    """What is written into a file is what is read from it, unknown fields included."""
    with_more = contract.parse_manifest(json.dumps({**manifest.model_dump(mode="json"), "from_the_future": {"x": 1}}))
    assert with_more == contract.parse_manifest(with_more.model_dump_json())
    assert {"x": 1} == with_more.model_dump()["from_the_future"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": []}, "classes"),
        ({"classes": ["a", "a"]}, "classes has a duplicate name"),
        ({"name": "../x"}, "name"),
        ({"temperature": 0}, "temperature"),
        ({"schema_version": 2}, "schema_version 2"),
        ({"window": 0}, "window"),
        ({"conformal": {"level": 1.5, "threshold": 0.1}}, "conformal.level"),
        ({"reference": {"confidence": {"edges": [0.5, 0.5], "shares": [1, 1, 1]}}}, "rising edges"),
    ],
)
def test_a_broken_manifest_is_refused_by_field(change: dict[str, object], said: str) -> None:
    """A field out of its range is named."""
    with pytest.raises(ContractError, match=said):
        contract.parse_manifest(json.dumps(SMALL | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "m"}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    """Anything but a JSON object with its required fields is an error of one line."""
    with pytest.raises(ContractError) as found:
        contract.parse_manifest(text)
    assert "\n" not in str(found.value)


def test_one_changed_byte_anywhere_breaks_the_seal() -> None:
    """Flipping one bit at a hundred places of the artefact is found each time."""
    content = ARTEFACT.read_bytes()
    contract.check_seal(content)
    for place in np.random.default_rng(0).integers(0, len(content), 100):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(ContractError, match="seal"):
            contract.check_seal(bytes(changed))


def test_a_damaged_seal_is_not_taken_for_none() -> None:
    """A flip in any byte of the seal itself, or of the word that there is one, is found too."""
    content = ARTEFACT.read_bytes()
    seal, word = contract._SEAL.search(content), content.index(contract.SEALED)
    assert seal is not None
    for place in (*range(*seal.span()), *range(word, word + len(contract.SEALED))):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(ContractError, match="seal"):
            contract.check_seal(bytes(changed))


def test_writing_seals_anew_and_keeps_the_network(tmp_path: Path) -> None:
    """Another manifest in the same file passes its seal and leaves every weight as it was."""
    before = onnx.load(ARTEFACT)
    digest = contract.write(ARTEFACT.read_bytes(), Manifest.model_validate(SMALL), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    contract.check_seal(content)
    assert digest == contract.digest(content) != contract.digest(ARTEFACT.read_bytes())
    assert before.graph == onnx.load_model_from_string(content).graph


def test_the_artefact_says_all_that_the_design_names(manifest: Manifest) -> None:
    """Classes, channels with units and ranges, golden windows, references, training and metrics are all there."""
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


def test_golden_windows_show_more_than_one_health(manifest: Manifest) -> None:
    """The golden windows are not all the same engine: they differ in what they answer."""
    assert len({int(softmax(golden.logits).argmax()) for golden in manifest.golden}) > 1
