"""What a frontend and the owner of a shard share when they answer the same calls: requests, errors as statuses, and
questions about profiles."""
