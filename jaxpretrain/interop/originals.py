"""The names of the papers' own releases, where they are not timm's."""

from __future__ import annotations

from typing import Any

TABLES: dict[str, dict[str, Any]] = {
    name: {} for name in ("deit", "dino", "dinov2", "mae", "moco", "mocov3", "beit", "eva", "clip", "sam", "swin")
}
