"""What a compilation did: data, and tables made from it."""
