"""Starts the command line: `python -m powermail`."""

from powermail.cli.main import main

raise SystemExit(main())
