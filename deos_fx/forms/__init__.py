"""A reduction as computation: static, to be run, and relaxed, to be searched."""
