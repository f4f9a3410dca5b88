"""Records: the journal on disk, and MLflow fed from it. The only package that imports mlflow."""
