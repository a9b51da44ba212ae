"""Owns one node's log: records and segments, what is durable, what is visible, what recovery believes. No asyncio here.

Rooms, lowest first
- `record` octets of a record · `segments` files · `keys` the derived key index · `damage` stretches that cannot be read
- `ledger` what the log holds, and the changes of a write until it is durable
- `write` batches · `reader` copies and names · `scan` the log in its order · `compaction` space · `recovery` opening
- `store` puts them together, and says which may be called from which lane
"""
