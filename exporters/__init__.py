"""ONNX: export a reduced model to files, and run these files."""
