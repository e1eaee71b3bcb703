"""Policies as plain data: reductions, the policies made of them, and limits on their cost."""
