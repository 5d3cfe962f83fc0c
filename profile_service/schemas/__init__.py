"""The schemas that come with the service."""
