"""Fingerprints of settings."""

from __future__ import annotations

import hashlib
import json


def digest(content: object) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
