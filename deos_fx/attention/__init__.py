"""The one seam to attention: observations of it, and masks with a bias on the logits."""
