"""Structure: what a network of the space is, what it costs, and how a live one is cut from its frame in place."""
