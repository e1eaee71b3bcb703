"""Features of the visual tokens, computed where a reduction asks for them."""
