"""Opening a stored message by its key: where it lies, its commit record, its octets."""
