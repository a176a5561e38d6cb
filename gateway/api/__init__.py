"""The HTTP edge: what comes in from people's programs and what goes back."""
