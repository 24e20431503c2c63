"""Procedural sample datasets, so that the pipeline runs with nothing downloaded."""
