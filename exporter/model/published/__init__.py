"""Published models as data, a file for each generation (`generation.Generation`)."""
