"""The console: static files and their routes."""
