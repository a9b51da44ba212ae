"""The simulated world: a disk that loses, tears and reorders what was not synced, and fails on request."""
