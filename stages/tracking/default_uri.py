"""Where MLflow's records go unless the user says otherwise. Importing it loads nothing of MLflow."""

from pathlib import Path

SQLITE = "sqlite:///"


def default_uri(runs: Path) -> str:
    """Tracking URI of the runs folder's own database, `sqlite:////…/mlflow.db`; artifacts lie beside it."""
    return f"{SQLITE}{runs.absolute() / 'mlflow.db'}"
