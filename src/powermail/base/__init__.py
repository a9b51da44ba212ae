"""The world: clock, network, disk, entropy and threads behind seams, with limits, errors, tasks, log and settings."""
