"""Facts inferred about a model before it is captured, and running it without its weights."""
