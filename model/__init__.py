"""The network, the arithmetic and the artefact. Independent of serving."""
