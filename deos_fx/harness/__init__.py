"""Serve reduced and exported models to evaluation harnesses, through their plugin entry points."""
