"""The servers of Prefect and MLflow, and how a run finds them."""
