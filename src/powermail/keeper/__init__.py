"""Keeping: what nobody waits for, and what makes the promises true after faults (docs/laws.md).

| job | laws | a unit of work |
|---|---|---|
| `admission` | 10, 12 | compares a node that was opened with the index |
| `epochs` | 10, 11 | marks on the nodes; what follows when the index lost commits |
| `reconcile`, `walk` | 6, 11 | a node's log, or all of its keys, against the index |
| `forget` | 9 | rounds, after which dead rows may go |
| `collect` | 1, 8 | orders and drops, carried out on their node |
| `repair`, `endangered` | 8 | messages with too few copies get more, those with the fewest first |
| `scrub`, `belief` | 12 | each copy gets a verdict, each belief is compared with the node |
| `compact` | 9, 10 | space of what is dead and forgotten |
| `checkpoint`, `rebuild` | 13 | mailboxes written to the nodes; the index made anew from them |

Where a node can hang, a job has a `step(node)` and one worker for each node, so that a sick one holds up no other (law 14).
"""
