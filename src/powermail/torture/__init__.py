"""The torture: a real cluster of processes, taken apart while clients use it, and judged by what they were told."""
