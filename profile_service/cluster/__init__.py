"""Where shards are, and how a batch or a question finds them."""
