"""What is coupled, what is known, and what may go: analysis only, nothing is rewritten here."""
