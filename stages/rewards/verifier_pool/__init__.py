"""Processes that judge, with limits of time and memory."""
