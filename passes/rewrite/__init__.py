"""Rewrite a graph without changing its results."""
