"""Measures; run `make bench`. Timed figures belong here and in docs/performance.md, never in the tests."""
