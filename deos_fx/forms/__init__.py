"""Reductions as computation: the static form, which is run, and the relaxed, which is searched."""
