"""Writing a compiled module out as files that need torch alone."""
