"""A throw-away app whose migrations change conversations; a test says which operations they have."""
