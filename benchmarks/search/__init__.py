"""How policies are found: searches compared at equal numbers of evaluations, and ablations."""
