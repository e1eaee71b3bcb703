"""Analyse a graph; nothing changes but its annotations."""
