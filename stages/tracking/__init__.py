"""Records: the journal on disk, and MLflow fed from it. The only room that imports mlflow."""
