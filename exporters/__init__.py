"""The ONNX side: what turns a reduced model into files, and what runs these files."""
