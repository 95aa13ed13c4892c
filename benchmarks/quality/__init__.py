"""What scales do to a model. Nothing is timed here."""
