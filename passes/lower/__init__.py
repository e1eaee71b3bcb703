"""Insert reductions into a graph, as static ops or in their relaxed form."""
