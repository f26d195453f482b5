"""Small worlds to forget in: a base pretrained here, experts tuned from it, and what both are asked."""
