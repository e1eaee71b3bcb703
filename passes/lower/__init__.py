"""Reductions become part of a graph, as static ops or relaxed."""
