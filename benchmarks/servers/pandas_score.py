"""A simple implementation: pandas groups by engine, windows are stacked, ONNX Runtime runs them."""

import json
import sys

import numpy as np
import onnxruntime as ort
import pandas as pd

model, source, target = sys.argv[1:]
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
manifest = json.loads(session.get_modelmeta().custom_metadata_map["manifest"])
channels = [channel["name"] for channel in manifest["channels"]]
window, classes = manifest["window"], manifest["classes"]

frames = []
for engine, flights in pd.read_parquet(source).groupby("engine_id", sort=False):
    flights = flights.sort_values("cycle")
    readings = flights[channels].to_numpy(np.float32)
    windows = []
    for end in range(1, len(readings) + 1):
        rows = readings[max(0, end - window) : end]
        padding = np.repeat(rows[:1], window - len(rows), axis=0)
        windows.append(np.concatenate([padding, rows]))
    logits, rul = session.run(["logits", "rul"], {"telemetry": np.stack(windows)})
    z = logits.astype(np.float64) / manifest["temperature"]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    predictions = pd.DataFrame(p, columns=[f"p_{name}" for name in classes])
    predictions.insert(0, "engine_id", engine)
    predictions.insert(1, "cycle", flights["cycle"].to_numpy())
    predictions.insert(2, "health", np.array(classes)[p.argmax(axis=1)])
    predictions["rul"] = rul
    frames.append(predictions)
pd.concat(frames).to_parquet(target, index=False)
