"""Training with a network that narrows while it learns."""
