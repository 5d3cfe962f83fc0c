"""What a profile is: pure, without I/O, clock, Ray or gRPC."""
