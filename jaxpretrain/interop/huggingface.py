"""Hugging Face transformers' names."""

from __future__ import annotations

from typing import Any

TABLES: dict[str, dict[str, Any]] = {"hf": {}}
