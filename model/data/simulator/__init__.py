"""A simulator of turbofan fleets, fitted to C-MAPSS."""
