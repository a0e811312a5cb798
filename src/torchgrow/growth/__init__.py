"""Growth: the order of things in a run, on a live network, towards a budget."""
