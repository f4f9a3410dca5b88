"""Answers: read, compared, judged."""
