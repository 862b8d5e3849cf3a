"""Export checkpoint and calibration to an unverified ONNX artefact with a dynamic batch and a fixed window.

python -m export.to_onnx        # the second step of `make export`; `export.verify` verifies the file
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
from model.training.calibrate import CALIBRATION
from model.training.channel_major import ChannelMajorNetwork
from model.training.cross_fit import CHECKPOINT, load_checkpoint
from model.training.network import EngineHealth, Normaliser
from model.training.overlap import OverlapNetwork
from model.training.train import TrainingConfig

UNVERIFIED = Path("build/unverified.onnx")


def export_network(network: torch.nn.Module, window: int) -> bytes:
    """Export the network to ONNX: input `telemetry` [batch, window, 17], outputs `logits` and `rul`.

    Only the batch is dynamic. With a dynamic time axis, recurrent layers are exported without an error but incorrect.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    return _export_module(
        network, (_example_rows(2, window),), [contract.INPUT], [contract.LOGITS, contract.RUL], (batch,)
    )


def export_overlap_graph(network: EngineHealth) -> bytes | None:
    """Export the overlap graph: `telemetry` [rows, 17] and `starts` [windows] to `logits`, `rul` and `exact`.

    Returns None if the backbone does not support it.
    """
    window = network.config.window
    try:
        module = OverlapNetwork(network)
    except ValueError:
        return None
    rows = {0: torch.export.Dim("rows", min=window)}, {0: torch.export.Dim("windows", min=1)}
    names = [contract.INPUT, contract.STARTS], [contract.LOGITS, contract.RUL, contract.EXACT]
    return _export_module(module, (_example_rows(window + 40), torch.arange(20)), *names, rows)


def export_channel_major(network: EngineHealth) -> bytes | None:
    """Export the channel-major graph, which has the same output bits, or return None if it is not supported."""
    try:
        return export_network(ChannelMajorNetwork(network), network.config.window)
    except ValueError:
        return None


def _example_rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, len(contract.CHANNELS), generator=torch.Generator().manual_seed(0))


def _export_module(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision, which is not needed
    with warnings.catch_warnings():  # torch warns about its internals, differently in every release
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            external_data=False,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None  # the dynamo exporter returns a program
    proto = program.model_proto
    for node in proto.graph.node:  # stack traces of this machine, 10 % of the file
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.value_info[:]
    return bytes(proto.SerializeToString())


def condition_statistics(normalise: Normaliser) -> dict[str, Any]:
    """Return the statistics of operating conditions in physical units, for the manifest."""
    means = torch.cat([normalise.centres, normalise.means], dim=1)
    statistics = {"setting_scales": normalise.scales, "usual": means, "deviations": normalise.deviations}
    return {name: np.round(values.numpy().astype(np.float64), 5).tolist() for name, values in statistics.items()}


def build_manifest(
    network: EngineHealth, checkpoint: dict[str, Any], calibration: dict[str, Any], name: str
) -> Manifest:
    """Return the manifest without golden windows and tolerance, which `export.verify` adds."""
    config = TrainingConfig(**checkpoint["knobs"])
    calibration_fields = ("temperature", "conformal", "reference", "channels", "metrics")
    training = {key: checkpoint[key] for key in ("data", "subsets", "split", "knobs", "loss", "made_with", "seconds")}
    return Manifest.model_validate(
        {key: calibration[key] for key in calibration_fields}
        | {"name": name, "version": version("engine-health"), "classes": contract.CLASSES}
        | {
            "window": config.window,
            "rul_thresholds": config.thresholds,
            "conditions": condition_statistics(network.normalise),
        }
        | {
            "training": training
            | {"seed": config.seed, "code": code_version(), "temperature": calibration["temperature_fit"]}
            | {"alternatives": calibration["alternatives"]}
        }
    )


def code_version() -> str:
    """Return the commit of this checkout, with a suffix if it is modified, or else the package version."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return result.stdout.strip() or version("engine-health")


def main() -> None:
    """Export checkpoint and calibration to build/unverified.onnx."""
    parser = argparse.ArgumentParser(description="Export a checkpoint to ONNX.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--name", default="engine-health")
    parser.add_argument("--output", type=Path, default=UNVERIFIED)
    flags = parser.parse_args()
    try:
        network, checkpoint = load_checkpoint(flags.checkpoint)
        description = build_manifest(network, checkpoint, json.loads(flags.calibration.read_text()), flags.name)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"to_onnx: {str(error).splitlines()[0]}") from None
    window = network.config.window
    contract.write(
        export_network(network, window),
        description,
        flags.output,
        export_overlap_graph(network),
        export_channel_major(network),
    )
    print(f"wrote {flags.output}: {flags.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
