"""How callers speak to the service: gRPC and REST over one layer of checks, errors and metrics."""
