"""Windows to predictions. The only user of ONNX Runtime."""
