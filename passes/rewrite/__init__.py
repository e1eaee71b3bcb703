"""Rewrites that keep what a graph computes."""
