"""How bytes become columns: protobuf events scanned, split and decoded by kernels, without a Python object for each.

A batch goes `scan_batch` (frontend: what is valid, whose is it), `split_by_owner` and `gather` (each owner's events as
bytes), `decode_events` (shard: the columns that `domain` applies). All take a `WirePlan`, the schema's names compiled
to tables.
"""
