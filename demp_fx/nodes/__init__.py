"""What inserted graph nodes run."""
