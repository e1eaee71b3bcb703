"""Capture a model as a graph of blocks and glue."""
