"""Evidence that is made by hand, not by users."""
