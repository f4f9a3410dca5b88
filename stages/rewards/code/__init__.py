"""Programs as answers: run in a sandbox against tests."""
