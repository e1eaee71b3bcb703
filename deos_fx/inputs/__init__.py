"""A call made explicit: its images, positions and masks, and batches split into like parts."""
