"""Benchmarks of the service, run by `profile-service bench NAME`: each prints the machine, the versions and what it
measured, measures what it compares in one run, and checks the totals afterwards.

    load.py        events serialised before anything is timed, and the schema that counts them
    views.py       the events of preferences.yaml: views of cars, four attributes each
    processes.py   the service as users start it, what it costs, and the disk that it writes to
    generator.py   the process that holds a load and sends it
    producing.py   streams of batches: as fast as they go, or at a rate that nothing slows down
    reading.py     reads at a rate that nothing slows down
    ingest.py      events a second, what each costs, how soon they are acknowledged, and what durability costs
    flood.py       what producers without restraint do to resident memory
    soak.py        whether memory grows or latency drifts in a long time
    peers/         what others do on the same work
    recovery.py    from the start of a shard's process to its first read, by phase
    snapshot.py    what a snapshot does to the time of an acknowledgement
    chart.py       the drawings in docs/
    report.py      the table of costs in docs/performance.md
"""
