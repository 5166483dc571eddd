"""From a recipe to judged folders."""
