"""The passes, one a file: each a small callable on a graph."""
