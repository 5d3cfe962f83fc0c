"""What of this folder is collected."""

collect_ignore = ["fleet_cases.py"]
"""It loads Ray; `test_fleet` runs it in a process of its own."""
