"""One operation a file: equation, torch reference, Triton forward and backward, dispatch."""
