"""What is promised to senders: who gets a message, that it is durable, what the reply may say."""
