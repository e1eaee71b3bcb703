"""A call made explicit: its images, positions and masks, and batches as parts that are alike."""
