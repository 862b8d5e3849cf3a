"""The HTTP edge: wiring, schemas, routes. Everything here translates; nothing here decides."""
