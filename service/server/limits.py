"""Limits of the server that the application also publishes."""

HEADER_BYTES = 64 * 1024  # request line and headers of one request
