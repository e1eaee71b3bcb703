"""The graphs that are exported."""
