"""Orchestrate: the only package that imports prefect; thin; file names are verbs."""
