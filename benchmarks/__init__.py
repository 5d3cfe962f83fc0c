"""Benchmarks of the service: each prints the machine, the versions, the CPU time of every process and a floor from the
same run."""
