"""Who owns the GPU: its state, the hand-over, its memory, its lease."""
