"""Spaces, directions, intervals and benchmark tables, computed from plain arrays and tables."""
