"""A model that runs a policy: to call, generate with, explain and save."""
