"""Inputs to compare two modules on: random ones of another batch size, or of another image size."""

from __future__ import annotations

SMALL = 64  # smaller images are made larger for another try, others smaller
