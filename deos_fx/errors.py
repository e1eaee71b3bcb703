"""The project's own exception types."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "DeviceError",
    "GuardError",
    "NoGroups",
    "PassError",
    "Undivided",
    "VerificationError",
]


class CaptureError(ValueError):
    """The model or its inputs cannot be captured; the message says what to do instead."""


class DeviceError(RuntimeError):
    """A device is not there, or the runtime cannot use it; the message says what is."""


class GuardError(RuntimeError):
    """An input takes another branch than the captured one; a prefill is then captured anew."""


class Undivided(ValueError):
    """It is unclear which pixels of a batch belong to which prompt; one by one, prompts can run."""


class VerificationError(RuntimeError):
    """A pass left a graph that breaks a rule; the message names the rule and the node."""


class PassError(RuntimeError):
    """A pass failed by a bug of its own; the message names the pass, and its cause is chained."""


class NoGroups(ValueError):
    """Patches of a vision tower cannot be followed to visual tokens.

    The message is the reason, as a clause: it is shown as the reason why a site is not available.
    """
