"""Keepers against nodes and an index in memory: each fault is a test that is named by the fact."""
