"""Work nobody waits for: reconcile, repair, collect, compact, checkpoint, scrub."""
