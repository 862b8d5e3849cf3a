"""LitServe: one worker with batching. A request may have many windows, so a batch is joined and split by rows."""

import os
import sys

import litserve as ls
import numpy as np
import onnxruntime as ort


class Health(ls.LitAPI):
    """The artefact behind LitServe's hooks."""

    def setup(self, device):  # noqa: ARG002  # LitServe passes it
        """Open the model once per worker."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        """Convert JSON to windows (k, 100, 17)."""
        return np.array([instance["telemetry"] for instance in request["instances"]], np.float32)

    def batch(self, inputs):
        """Return the requests as a list, because they have different numbers of rows."""
        return inputs

    def predict(self, inputs):
        """Run the rows of all requests together."""
        logits, rul = self.session.run(["logits", "rul"], {"telemetry": np.concatenate(inputs)})
        ends = np.cumsum([len(windows) for windows in inputs])[:-1]
        return list(zip(np.split(logits, ends), np.split(rul, ends), strict=True))

    def unbatch(self, output):
        """Return one output per request."""
        return output

    def encode_response(self, output):
        """Convert the outputs of a request to JSON."""
        logits, rul = output
        return {"logits": logits.tolist(), "rul": rul.tolist()}


if __name__ == "__main__":
    api = Health(max_batch_size=64, batch_timeout=0.005)
    server = ls.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
