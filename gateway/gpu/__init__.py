"""Who owns the GPU: the hand-over, its memory, its lease."""
