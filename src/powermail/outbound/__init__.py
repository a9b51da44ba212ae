"""Mail that leaves: leasing the queue, sending to the smarthost, retries, expiry, bounces."""
