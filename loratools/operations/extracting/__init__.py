"""The steps of an extraction."""
