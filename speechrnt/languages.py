"""What the text of a language looks like."""

__all__ = ["UNSPACED"]

UNSPACED = frozenset({"zh", "ja", "yue", "th", "lo", "my", "km"})
"""Codes of languages that are written without spaces between words."""
