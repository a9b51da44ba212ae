"""Who exists: addresses, forwards, passwords, quotas. One INSERT makes a mailbox; no table of domains is needed."""
