"""Tables of operations on the channel path, each of (batch, 8, 6, 6)."""
