"""Fit: the loop (no Ray in it), and the Ray Train job around it."""
