"""Many nodes as one store: placement, replication, fetching, health."""
