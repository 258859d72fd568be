"""Teachers: the seam every backend stands behind, and the request loop that stands above it."""
