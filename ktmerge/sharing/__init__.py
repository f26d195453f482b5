"""Recipes handed to others: packed with all that pins them, pushed, pulled, and never trusted on the way in."""
