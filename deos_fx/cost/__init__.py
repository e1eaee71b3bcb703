"""What a policy costs: FLOPs, bytes and milliseconds, without running it."""
