"""The network, the arithmetic and the artefact: everything that is true without a server."""
