"""Exporters: GGUF and ONNX, each refused when it breaks its contract."""
