"""The results of searches, explanations and the demo, and the pages that show them."""
