"""The one seam to attention."""
