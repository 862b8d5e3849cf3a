"""Web server: connections, bytes, limits. The only user of uvicorn, uvloop and httptools; independent of the model."""
