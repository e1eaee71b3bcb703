"""From a model to a graph of blocks and glue."""
