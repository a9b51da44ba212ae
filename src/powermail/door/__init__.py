"""What every front door shares: the connection, the line session, login, who may connect."""
