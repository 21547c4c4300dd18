"""Which channels matter: scores over pruning groups."""
