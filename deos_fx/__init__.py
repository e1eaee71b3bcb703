"""deos_fx."""
