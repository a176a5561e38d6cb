"""What a model weighs, what fits, and how fast at most: arithmetic only."""
