"""The search for a policy."""
