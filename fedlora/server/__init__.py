"""What the server does in a round, whatever the strategy: whom it asks, what travels, what it takes and how it merges."""
