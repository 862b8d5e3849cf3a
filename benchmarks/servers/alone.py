"""ONNX Runtime without a server, on windows in float32: prints rows/s at batch 1, the best rows/s and its batch."""

import os
import time

import numpy as np
import onnxruntime as ort

from benchmarks.load import windows

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
telemetry, rates = windows(1024).astype(np.float32), {}
for batch in (1, 16, 32, 64, 128, 256, 512, 1024):
    batch_windows, times = np.ascontiguousarray(telemetry[:batch]), []
    for _ in range(max(15, 200 // batch)):
        started = time.perf_counter()
        session.run(None, {"telemetry": batch_windows})
        times.append(time.perf_counter() - started)
    rates[batch] = batch / float(np.median(times))
best = max(rates, key=rates.__getitem__)
print(rates[1], rates[best], best)
