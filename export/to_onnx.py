"""Checkpoint and calibration to an unverified artefact: the dynamo exporter, a free batch, a fixed window, one file.

python -m export.to_onnx        # the second step of `make export`; `export.verify` makes it the artefact
"""

import argparse
import json
import logging
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import contract
from model.contract import Manifest
from model.training.calibrate import OUTPUT as CALIBRATION
from model.training.channel_major import Plan
from model.training.cross_fit import CHECKPOINT, load
from model.training.network import EngineHealth, Normaliser
from model.training.overlap import Histories
from model.training.train import Knobs

UNVERIFIED = Path("build/unverified.onnx")


def to_onnx(network: torch.nn.Module, window: int) -> bytes:
    """The network as ONNX: input `telemetry` [batch, window, 17], outputs `logits` and `rul`.

    Only the batch is free. A free time axis exports without a word and answers wrongly in recurrent layers.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    return _exported(network, (_rows(2, window),), [contract.INPUT], [contract.LOGITS, contract.RUL], (batch,))


def histories_to_onnx(network: EngineHealth) -> bytes | None:
    """The graph over histories: `telemetry` [rows, 17] and `starts` [windows] to `logits`, `rul` and `exact`.

    None if the backbone cannot share work between windows.
    """
    window = network.config.window
    try:
        module = Histories(network)
    except ValueError:
        return None
    rows = {0: torch.export.Dim("rows", min=window)}, {0: torch.export.Dim("windows", min=1)}
    names = [contract.INPUT, contract.STARTS], [contract.LOGITS, contract.RUL, contract.EXACT]
    return _exported(module, (_rows(window + 40), torch.arange(20)), *names, rows)


def plan_to_onnx(network: EngineHealth) -> bytes | None:
    """The network's graph laid out for speed, to the same bits; None if its backbone cannot have one."""
    try:
        return to_onnx(Plan(network), network.config.window)
    except ValueError:
        return None


def _rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, len(contract.CHANNELS), generator=torch.Generator().manual_seed(0))


def _exported(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    free: tuple[dict[int, Any], ...],
) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it asks for torchvision, which nothing here needs
    with warnings.catch_warnings():  # torch warns of its own internals, differently in every release
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            external_data=False,
            dynamic_shapes=free,
            verbose=False,
        )
    assert program is not None  # the dynamo exporter returns a program
    proto = program.model_proto
    for node in proto.graph.node:  # stack traces of this machine: a tenth of the file, and nobody's business
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.value_info[:]
    return bytes(proto.SerializeToString())


def conditions(normalise: Normaliser) -> dict[str, Any]:
    """What the network takes for usual, in physical units."""
    usual = torch.cat([normalise.centres, normalise.means], dim=1)
    shown = {"setting_scales": normalise.scales, "usual": usual, "deviations": normalise.deviations}
    return {name: np.round(values.numpy().astype(np.float64), 5).tolist() for name, values in shown.items()}


def manifest(network: EngineHealth, checkpoint: dict[str, Any], calibration: dict[str, Any], name: str) -> Manifest:
    """What the artefact says of itself; golden windows and tolerance are `export.verify`'s to add."""
    knobs = Knobs(**checkpoint["knobs"])
    kept = ("temperature", "conformal", "reference", "channels", "metrics")
    training = {key: checkpoint[key] for key in ("data", "subsets", "split", "knobs", "loss", "made_with", "seconds")}
    return Manifest.model_validate(
        {key: calibration[key] for key in kept}
        | {"name": name, "version": version("engine-health"), "classes": contract.CLASSES}
        | {"window": knobs.window, "rul_thresholds": knobs.thresholds, "conditions": conditions(network.normalise)}
        | {
            "training": training
            | {"seed": knobs.seed, "code": code_version(), "temperature": calibration["temperature_fit"]}
            | {"alternatives": calibration["alternatives"]}
        }
    )


def code_version() -> str:
    """The commit of this checkout, with a mark if files differ from it; the package version elsewhere."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or version("engine-health")


def main() -> None:
    """Checkpoint and calibration to build/unverified.onnx."""
    parser = argparse.ArgumentParser(description="Export a checkpoint to ONNX.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--name", default="engine-health")
    parser.add_argument("--output", type=Path, default=UNVERIFIED)
    flags = parser.parse_args()
    try:
        network, checkpoint = load(flags.checkpoint)
        described = manifest(network, checkpoint, json.loads(flags.calibration.read_text()), flags.name)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"to_onnx: {str(error).splitlines()[0]}") from None
    window = network.config.window
    contract.write(to_onnx(network, window), described, flags.output, histories_to_onnx(network), plan_to_onnx(network))
    print(f"wrote {flags.output}: {flags.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
