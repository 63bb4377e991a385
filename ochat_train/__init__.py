"""Padding-free, condition-aware fine-tuning of chat models (C-RLFT)."""

__version__ = "0.1.0"
