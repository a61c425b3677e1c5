"""Rendered rows in files: made once by several processes, read by every rank."""
