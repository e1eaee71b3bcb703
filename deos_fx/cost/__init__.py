"""The cost of a policy: FLOPs and bytes without running the model, and measured milliseconds."""
