"""Decoding in this process: batches, shared prefixes, drawing of tokens."""
