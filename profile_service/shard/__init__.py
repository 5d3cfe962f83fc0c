"""How one shard behaves."""
