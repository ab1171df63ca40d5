"""Published models as data, a file for each generation: names as published, in lower case -> facts."""
