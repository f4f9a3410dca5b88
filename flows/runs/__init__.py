"""Runs on disk: records, lookup, retention."""
