"""`python -m profile_service` is the command `profile-service`."""

from profile_service.cli import main

main()
