"""What do the samples say? Pure arithmetic: nothing is read, written or requested here."""
