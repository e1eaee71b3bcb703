"""What is inferred of a model before it is captured, and how to run it without its weights."""
