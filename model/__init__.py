"""The network, its numerics and the artefact. Does not import the service; import-linter verifies this."""
