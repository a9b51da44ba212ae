"""What each mailbox shows: mailboxes, entries, messages and their copies, the queue, and the keeper's bookkeeping."""
