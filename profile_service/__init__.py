"""Real-time user profiles: events stream in over gRPC, profiles are right the moment an event is acknowledged."""

__version__ = "0.1.0"
