"""MLflow: connection, runs, artifacts, registry."""
