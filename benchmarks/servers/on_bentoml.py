"""BentoML: one worker with adaptive batching. Logits and RUL share one array, because a batchable API returns one."""

import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
import onnxruntime as ort
from bentoml.validators import DType, Shape

Windows = Annotated[np.ndarray, DType("float32"), Shape((-1, 100, 17))]


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Health:
    """The artefact as a BentoML service."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=1024, max_latency_ms=10_000)
    def predict(self, telemetry: Windows) -> np.ndarray:
        """Return rows of logits and RUL (k, 4)."""
        logits, rul = self.session.run(["logits", "rul"], {"telemetry": telemetry})
        return np.column_stack([logits, rul])


if __name__ == "__main__":
    command = ["-m", "bentoml", "serve", "on_bentoml:Health", "--working-dir", str(Path(__file__).parent)]
    os.execv(sys.executable, [sys.executable, *command, "--host", "127.0.0.1", "--port", sys.argv[1]])
