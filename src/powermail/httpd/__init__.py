"""The front door of monitoring: HTTP, figures for Prometheus, and whether this process lives and is ready."""
