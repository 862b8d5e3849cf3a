"""The service: one ONNX file behind HTTP. Never imports torch, pandas or `export`."""
