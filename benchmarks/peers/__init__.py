"""What others do on the same work: the same batches, the same features, run beside ours in the same turns.

    dicts.py        plain Python objects in a dict: no network, no durability
    redis_rows.py   a consumer that keeps a packed row per user in Redis
    consumer.py     the process that runs one of them, and what it costs
    fastapi_redis.py  profiles as JSON in Redis, served by FastAPI: what reads are measured beside
    redis_server.py the Redis of both

Peers have it easier than ours: they take batches from their own memory, and ours over the network; they keep every make
that comes, and ours the heaviest in bounded room; they count an event again when it comes again. Their weights are
relative to one landmark, so nothing is ever rescaled.
"""
