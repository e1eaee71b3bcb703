"""Sessions of ONNX Runtime, and the cache that they fill."""
