"""A bundle's numbers against independent references."""
