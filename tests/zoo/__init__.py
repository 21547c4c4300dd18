"""Networks that others wrote, ways to kill their channels, and an oracle of what can then go."""
