"""What to do, as data: reductions, policies, and limits on what they cost."""
