"""Remember: the only package that imports mlflow."""
