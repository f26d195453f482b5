"""Small worlds to forget in: a base pretrained here, experts tuned from it, and what both are asked."""

from worlds.text import TEXT
from worlds.vision import VISION

WORLDS = {world.name: world for world in (TEXT, VISION)}
"""By name."""
