"""The three commands (score, build-targets, train) and what only they need."""
