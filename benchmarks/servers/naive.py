"""A simple implementation: FastAPI, orjson and ONNX Runtime in the handler, without batching."""

import os
import sys

import numpy as np
import onnxruntime as ort
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()


@app.get("/ready")
async def ready() -> dict[str, bool]:
    """Report that the server accepts requests."""
    return {"ready": True}


@app.post("/predict")
async def predict(request: Request) -> Response:
    """Return logits and RUL of every instance."""
    instances = orjson.loads(await request.body())["instances"]
    telemetry = np.array([instance["telemetry"] for instance in instances], np.float32)
    logits, rul = session.run(["logits", "rul"], {"telemetry": telemetry})
    answer = orjson.dumps({"logits": logits, "rul": rul}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(answer, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
