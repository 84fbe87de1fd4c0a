"""What trained drafters share: layers, their artifact, conversions."""
