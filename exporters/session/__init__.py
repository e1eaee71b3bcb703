"""Run exported graphs: sessions of ONNX Runtime and the cache that they fill."""
