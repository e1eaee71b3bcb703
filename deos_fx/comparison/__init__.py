"""Compare policies with tuned presets and other ways to spend less on an image."""
