"""Rules: how labels pass through every kind of operation."""
