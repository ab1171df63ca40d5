"""From checkpoint tensors to initializers: recipes, and the pass that carries them out."""
