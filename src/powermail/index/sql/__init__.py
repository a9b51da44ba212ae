"""Owns the index as SQL: one text for every engine. `index.sqlite` and `index.postgres` run it, and add what must differ.

Bodies of transactions are coroutines over `sql.engine.Transaction`; the engine decides what a wait is. Where others write
too, what a body decides by is locked first (laws 6-9).

Lock order, for all who write, so that two wait for each other and never in a ring:

1. the counter of the layout;
2. rows of nodes, by id;
3. keys (rows of `messages`), sorted; those that are new too, and all of a transaction before anything of what follows;
4. mailboxes: new ones by account and name, then those that are there, by id, all in one statement;
5. rows of the queue, by id;
6. the other counters, as `sql.engine.COUNTERS` names them;
7. what stands alone, sorted: returns, tallies, owners, newcomers, tokens and then identities;
8. writer slots, by id: each transaction its own last, after which it waits for nothing;
9. jobs that are leased, each by a statement that holds its writer slot and nothing else (`index.postgres.leases`).

Entries, views, changes, attempts, orders, drops, suspects and notes are touched by who holds the mailbox, queue row, key or
node that they belong to; rows of `gone` also by who holds their key only: by key. A statement that changes many rows of any of
these is given them by one that has locked them in order. Text is sorted by code point, never by the collation of a database. A
set of nodes is made in a transaction of its own, before the one that names it: who is second to make it waits for the first.
"""
