"""Run: the services around the pipeline."""
