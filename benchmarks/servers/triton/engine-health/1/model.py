"""Triton's Python backend: the requests of a batch are run together."""

import os
import sys

sys.path.insert(0, os.environ["PACKAGES"])  # the backend's interpreter uses Debian's packages only

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The artefact as a Triton model."""

    def initialize(self, args):  # noqa: ARG002  # Triton passes it
        """Open the model once."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """Run the rows of all requests together."""
        inputs = [pb_utils.get_input_tensor_by_name(request, "telemetry").as_numpy() for request in requests]
        logits, rul = self.session.run(["logits", "rul"], {"telemetry": np.concatenate(inputs)})
        ends = np.cumsum([len(windows) for windows in inputs])[:-1]
        parts = zip(np.split(logits, ends), np.split(rul[:, np.newaxis], ends), strict=True)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits_part), pb_utils.Tensor("rul", rul_part)])
            for logits_part, rul_part in parts
        ]
