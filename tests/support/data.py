"""Real images that lie beside the repository on some machines."""

from __future__ import annotations

from pathlib import Path

CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid"
