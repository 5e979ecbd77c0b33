"""What happens when a conversation's time is up: the sweep, and the handlers that act on it."""
