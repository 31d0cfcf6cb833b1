"""Pure tensor functions of the eviction node, and the eager oracle they are tested against."""
