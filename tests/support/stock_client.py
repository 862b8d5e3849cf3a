"""Call a running service with the stock `tritonclient.http` in JSON and binary encoding.

A test runs it in the client's environment: python tests/support/stock_client.py HOST:PORT windows.npy
"""

import json
import sys

import numpy as np
import tritonclient.http as triton


def main() -> None:
    """Print the results of every encoding and option as JSON."""
    client = triton.InferenceServerClient(sys.argv[1])
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("engine-health")
    metadata = client.get_model_metadata("engine-health")
    windows = np.load(sys.argv[2])
    results = {"name": metadata["name"], "extensions": client.get_server_metadata()["extensions"]}
    for binary in (True, False):
        telemetry = triton.InferInput("telemetry", list(windows.shape), "FP32")
        telemetry.set_data_from_numpy(windows, binary_data=binary)
        label = triton.InferInput("label", [len(windows)], "INT64")
        label.set_data_from_numpy(np.arange(len(windows)) % 3, binary_data=binary)
        names = ("logits", "probabilities", "rul", "health", "loss")
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
        for compression in (None, "gzip"):
            answer = client.infer(
                "engine-health",
                [telemetry, label],
                outputs=outputs,
                request_id="7",
                request_compression_algorithm=compression,
            )
            assert answer.get_response()["id"] == "7"
            results[f"{binary} {compression}"] = {
                name: [x.decode() if isinstance(x, bytes) else x for x in answer.as_numpy(name).ravel().tolist()]
                for name in names
            }
        plain = client.infer("engine-health", [telemetry])
        results[f"{binary} plain"] = {"logits": plain.as_numpy("logits").ravel().tolist()}
    try:
        client.infer("other", [telemetry])
    except triton.InferenceServerException as error:
        results["error"] = str(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
