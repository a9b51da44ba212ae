"""Protocol machines without I/O: they never wait, never read a clock, and behave the same for every chunking."""
