"""The passes of the compiler, one file each; deos_fx runs them in the order of its pipeline."""
