"""What do the samples say? Figures computed from them; nothing is read, written or asked."""
