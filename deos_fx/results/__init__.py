"""What was found, and its page."""
