"""Helpers of tests that attach foreign classifiers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from export.attach import main
from service.inference.model_loader import open_model
from service.inference.onnx_model import Model

Values = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


def attach(source: Path, target: Path, logits: str, classes: str, *flags: str) -> Model:
    """Run the command in this process, and open the model as the service does."""
    main([str(source), str(target), "--logits", logits, "--classes", classes, *flags])
    return open_model(target, batch_rows=16)


def refusal(*arguments: object) -> str:
    """Return the single line that the command prints."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, str)  # becomes exit code 1
    assert 1 == len(ended.value.code.splitlines())
    return ended.value.code.removeprefix("attach: ")


def softmax(logits: Floats, t: float = 1.0) -> Floats:
    """Return the softmax of each row in float64, computed by torch."""
    result: Floats = torch.softmax(torch.from_numpy(logits) / t, 1).numpy()
    return result
