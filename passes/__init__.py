"""Passes: small steps from a captured graph to a searched or a lowered one."""
