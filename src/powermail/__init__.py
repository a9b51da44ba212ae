"""PowerMail: a redundant and distributed system for receiving, storing and forwarding email."""

# SPDX-License-Identifier: GPL-2.0-or-later

__version__ = "0.1.0"
