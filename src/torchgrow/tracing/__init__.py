"""Tracing: which units a model has, found by running it, and proven on the model itself."""
