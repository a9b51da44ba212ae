"""What readers see: maildrops over the index and the nodes."""
