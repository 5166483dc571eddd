"""From a recipe to evaluated folders."""
