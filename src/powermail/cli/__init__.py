"""The command line: for people tables and progress, for machines --json; exit status 1 when degraded, 2 on a mistake."""
