"""How bytes survive; it knows nothing of profiles."""
