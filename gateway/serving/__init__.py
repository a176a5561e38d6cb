"""Who keeps the engines at hand: admission, the catalogue, discovery, loading."""
