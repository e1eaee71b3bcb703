"""Compute features of the visual tokens where a reduction asks for them."""
