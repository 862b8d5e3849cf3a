"""MLServer: a custom runtime, because none of its runtimes reads ONNX; with batching, without an extra process."""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Health(MLModel):
    """The artefact as an MLServer model."""

    async def load(self) -> bool:
        """Open the model once."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Return logits and RUL of every row. MLServer has joined the requests."""
        telemetry = NumpyCodec.decode_input(payload.inputs[0])
        logits, rul = self._session.run(["logits", "rul"], {"telemetry": telemetry})
        outputs = [NumpyCodec.encode_output("logits", logits), NumpyCodec.encode_output("rul", rul[:, np.newaxis])]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def free_port() -> str:
    """Return a port for gRPC or metrics, which are not used here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    server = {"HTTP_PORT": sys.argv[1], "GRPC_PORT": free_port(), "METRICS_PORT": free_port(), "PARALLEL_WORKERS": "0"}
    model = {
        "NAME": "engine-health",
        "IMPLEMENTATION": "on_mlserver.Health",
        "MAX_BATCH_SIZE": "64",
        "MAX_BATCH_TIME": "0.005",
    }
    os.environ |= {f"MLSERVER_{key}": value for key, value in server.items()} | {"MLSERVER_DEBUG": "false"}
    os.environ |= {f"MLSERVER_MODEL_{key}": value for key, value in model.items()}
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = str(here)
    command = Path(sys.executable).with_name("mlserver")
    os.execv(command, [str(command), "start", str(here)])
