"""The operator's door: what can be asked and ordered, and a socket in the data directory to do it on a running server."""
