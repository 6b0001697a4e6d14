"""What the networks cost. Each module is a command; run from the repository's root."""
