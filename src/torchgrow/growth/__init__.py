"""Growth: a run that changes the structure of a network in training until it meets a budget."""
