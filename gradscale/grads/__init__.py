"""Per-example gradients: factored while they exist, read layer by layer, then freed."""
