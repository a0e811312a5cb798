"""Structure: the space of networks inside a frame, their costs, and how a model is cut to one of them in place."""
