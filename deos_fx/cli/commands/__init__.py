"""The commands, each in a file of its name.

Every command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""
