"""Download an image, where a user has allowed it."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException

__all__ = ["download"]

_MAX_BYTES = 64 * 2**20
_TIMEOUT = 30


def download(url: str, where: str) -> bytes:
    """Return what a URL has.

    Args:
        url: An http or https URL.
        where: What asks for it, for messages.

    Raises:
        ValueError: If it cannot be read, or is larger than 64 MiB.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "deos_fx"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            contents = answer.read(_MAX_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{where}: {url} cannot be downloaded: {error}") from error
    if len(contents) > _MAX_BYTES:
        raise ValueError(f"{where}: {url} has more than {_MAX_BYTES // 2**20} MiB")
    return contents
