"""Persistence: networks and runs as plain data in folders, never as code."""
