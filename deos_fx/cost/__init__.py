"""The cost of a policy: FLOPs, bytes and milliseconds, without running it."""
