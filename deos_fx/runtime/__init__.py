"""A model that runs a policy: called, generated with, explained and saved."""
