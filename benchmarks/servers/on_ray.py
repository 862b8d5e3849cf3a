"""Ray Serve: one replica with batching. A request may have many windows, so a batch is joined and split by rows."""

import os
import sys
import threading

import numpy as np
import onnxruntime as ort
import ray
from ray import serve
from starlette.requests import Request

QUIET = {"enable_access_log": False}


@serve.deployment(num_replicas=1, max_ongoing_requests=256, logging_config=QUIET)
class Health:
    """The artefact as a Ray Serve deployment."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def infer(self, inputs):
        """Run the rows of all requests together."""
        logits, rul = self.session.run(["logits", "rul"], {"telemetry": np.concatenate(inputs)})
        ends = np.cumsum([len(windows) for windows in inputs])[:-1]
        return list(zip(np.split(logits, ends), np.split(rul, ends), strict=True))

    async def __call__(self, request: Request):
        """Parse JSON, predict and return JSON."""
        instances = (await request.json())["instances"]
        logits, rul = await self.infer(np.array([instance["telemetry"] for instance in instances], np.float32))
        return {"logits": logits.tolist(), "rul": rul.tolist()}


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=256 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config=QUIET)
    serve.run(Health.bind(), route_prefix="/predict")
    threading.Event().wait()
