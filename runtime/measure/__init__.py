"""What a load of requests costs: rounds of one row, and many requests at once, of a bundle or of any server."""
