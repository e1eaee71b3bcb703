"""The pipeline: small passes from a captured graph to a searched or a lowered one."""
