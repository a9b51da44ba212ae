"""Tests of the index: what a view is, the laws that are arithmetic, and one suite of the contract for all implementations."""
