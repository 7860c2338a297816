"""The tracker: attribution, intervention, credit and their statistics."""
