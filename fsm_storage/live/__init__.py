"""Pages that follow what happens: the sending of hints, and the websocket. Imported only where Channels is installed.

What goes over the wire is an alias, a record key and a version. Pages fetch the rest through the admin's views.
"""

GROUP = "fsm_storage.live"
"""The group of a channel layer to which all hints go."""
EVERY = 0.25
"""Seconds between two messages, of a process to the layer, and of the websocket to a page."""
