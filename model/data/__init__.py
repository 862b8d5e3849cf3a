"""Data: C-MAPSS, fleet files and simulated engines."""
