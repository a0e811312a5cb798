"""Integrations: growing inside the loops of other frameworks."""
