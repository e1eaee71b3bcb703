"""Build the graphs that are exported."""
