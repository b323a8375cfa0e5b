"""Training: objectives, one visible loop, the phases of the embedded model and their recipes."""

from .config import Recipe, load_recipe, recipe_names, recipe_path
from .run import train

__all__ = ["Recipe", "load_recipe", "recipe_names", "recipe_path", "train"]
