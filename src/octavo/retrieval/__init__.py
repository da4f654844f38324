"""Models that look things up: a store of passages that can change without training, and what reads it."""
