"""Naive oracles: each keeps every event and computes the contract's numbers from them when asked, in plain Python.

They share nothing with the service but the schema's options. A kind's oracle takes (time_ns, weight, value) in the
order of arrival and compares a message with what it computes; the first difference is an AssertionError that names both
numbers.
"""

from __future__ import annotations

from tests.domain.oracles.profile import ProfileOracle

__all__ = ["ProfileOracle"]
