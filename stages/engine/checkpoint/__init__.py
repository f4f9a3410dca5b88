"""Checkpoints: written by ranks, read under any layout."""
